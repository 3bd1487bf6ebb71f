// The products of mhc_pre on Metal. ring_cuda.h has the same words for CUDA.
#include "tiles.h"

namespace mhc {

// `sweep`, all of it aligned; on Metal without a ring
template <int OUTS, int THREADS, int RING, typename T, typename P, int TILES, int BLOCK, typename XP, typename PP>
inline void sweep_ring(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES], XP x, PP phi, const thread Course& c, uint token, int output) {
  sweep<true, OUTS, T, P>(sum, squares, x, phi, c, token, output);
}

}  // namespace mhc
