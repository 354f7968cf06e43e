// Included by `for_each_isa.h`: no include guard.

template <typename Hidden, NormRounding ROUNDING>
TARGET ALWAYS_INLINE Vector::Values normalise(
    const Vector::Values& values, const Vector::Values& weight, Vector::Scalar scale) {
  const Vector::Values normalised = Vector::multiply(values, scale);
  if constexpr (ROUNDING == NormRounding::unit_offset)
    return Vector::multiply(normalised, Vector::add(weight, Vector::broadcast(1.0f)));
  else if constexpr (ROUNDING == NormRounding::value_first)
    return Vector::multiply(weight, Vector::round<Hidden>(normalised));
  else
    return Vector::multiply(weight, normalised);
}

template <typename Hidden, NormRounding ROUNDING>
TARGET void norm_row(const void* hidden, const void* weight, float scale, int64_t width, void* output) {
  constexpr int64_t STEP = Vector::STEP;
  const Hidden* x = static_cast<const Hidden*>(hidden);
  const Hidden* w = static_cast<const Hidden*>(weight);
  Hidden* y = static_cast<Hidden*>(output);
  const Vector::Scalar factor = Vector::broadcast(scale);
  int64_t column = 0;
  for (; column + STEP <= width; column += STEP) {
    const Vector::Values values = Vector::load<Hidden>(x + column);
    Vector::store<Hidden>(y + column, normalise<Hidden, ROUNDING>(values, Vector::load<Hidden>(w + column), factor));
  }
  if (column < width) {
    const int64_t count = width - column;
    const Vector::Values values = load_tail<Hidden>(x + column, count);
    const Vector::Values weights = load_tail<Hidden>(w + column, count);
    store_tail<Hidden>(y + column, normalise<Hidden, ROUNDING>(values, weights, factor), count);
  }
}

template <typename Hidden>
NormRowFn select(NormRounding rounding) {
  switch (rounding) {
    case NormRounding::unit_offset:
      return &norm_row<Hidden, NormRounding::unit_offset>;
    case NormRounding::value_first:
      return &norm_row<Hidden, NormRounding::value_first>;
    default:
      return &norm_row<Hidden, NormRounding::product>;
  }
}

inline NormRowFn select(HiddenDtype hidden, NormRounding rounding) {
  switch (hidden) {
    case HiddenDtype::float32:
      return select<float>(rounding);
    case HiddenDtype::bfloat16:
      return select<BFloat16>(rounding);
    default:
      return select<Half>(rounding);
  }
}
