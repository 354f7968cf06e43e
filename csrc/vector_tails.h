// Fewer than STEP columns, the rest zeros. Included by `vectors.h` once for each instruction set: no include guard.

template <typename Hidden, typename Element>
TARGET __attribute__((noinline)) Vector::Values load_tail(const Element* source, int64_t count) {
  Element padded[Vector::STEP] = {};
  for (int64_t i = 0; i < count; ++i)
    padded[i] = source[i];
  return Vector::load<Hidden>(padded);
}

template <typename Hidden, typename Element>
TARGET __attribute__((noinline)) void store_tail(Element* target, const Vector::Values& values, int64_t count) {
  Element padded[Vector::STEP];
  Vector::store<Hidden>(padded, values);
  for (int64_t i = 0; i < count; ++i)
    target[i] = padded[i];
}
