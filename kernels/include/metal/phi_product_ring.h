// The phi product of mhc_pre on Metal. cuda/phi_product_ring.h defines the same words for CUDA.
#include "phi_product.h"

namespace mhc {

// accumulate_runs, where everything is aligned. Metal has no ring.
template <int NUM_LOGITS, int THREADS, int RING_BYTES, typename T, typename PHI_T, int TILES, int BLOCK, typename XP,
          typename PP>
METAL_FUNC void accumulate_runs_ring(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES], XP x, PP phi,
                                     const thread Runs& runs, uint token, int logit) {
  accumulate_runs<true, NUM_LOGITS, T, PHI_T>(sum, squares, x, phi, runs, token, logit);
}

}  // namespace mhc
