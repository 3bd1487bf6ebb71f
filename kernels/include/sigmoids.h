// The sigmoid of a number and of its negative, by one exp and one division.

namespace mhc {

// high = sigmoid(|z|), low = sigmoid(-|z|), with all their digits: 1 - high would lose those of low.
METAL_FUNC void sigmoids(float z, thread float& high, thread float& low) {
  const float e = metal::precise::exp(z < 0.0f ? z : -z);  // at most 1, so that RECIPROCAL is exact to its last digit
  high = RECIPROCAL(1.0f + e);
  low = e * high;
}

}  // namespace mhc
