// Included once for each instruction set, inside its namespace: no include guard. Expects `TARGET` and a `Vector`.
//
// `Vector` takes STEP columns at a time, of ROWS rows to a pass over the weights. Every row is reduced in an order that
// its number of columns fixes, however many rows share the pass: that makes a score independent of its batch.

template <typename Hidden, typename Element>
TARGET ALWAYS_INLINE Vector::Values load_tail(const Element* source, int64_t count) {
  Element padded[Vector::STEP] = {};
  for (int64_t i = 0; i < count; ++i)
    padded[i] = source[i];
  return Vector::load<Hidden>(padded);
}

template <typename Hidden, typename Weight, int OUTPUTS, int ROWS>
TARGET void dot_rows(
    const Hidden* const* hidden, const Hidden* const* next_hidden, const Weight* weight, const Weight* next_weight,
    int64_t weight_stride, int64_t columns, float* const* partials) {
  constexpr int64_t STEP = Vector::STEP;
  for (int64_t begin = 0; begin < columns; begin += FEATURE_CHUNK) {
    const int64_t end = std::min(begin + FEATURE_CHUNK, columns);
    Vector::Values sum[ROWS][OUTPUTS];
    for (int r = 0; r < ROWS; ++r)
      for (int o = 0; o < OUTPUTS; ++o)
        sum[r][o] = Vector::zero();

    int64_t column = begin;
    for (; column + STEP <= end; column += STEP) {
      Vector::Values w[OUTPUTS];
      for (int o = 0; o < OUTPUTS; ++o) {
        if (next_weight != nullptr)
          prefetch<STEP * sizeof(Weight)>(next_weight + o * weight_stride + column);
        w[o] = Vector::load<Hidden>(weight + o * weight_stride + column);
      }
      for (int r = 0; r < ROWS; ++r) {
        prefetch<STEP * sizeof(Hidden)>(next_hidden[r] + column);
        const Vector::Values h = Vector::load<Hidden>(hidden[r] + column);
        for (int o = 0; o < OUTPUTS; ++o)
          sum[r][o] = Vector::multiply_add(h, w[o], sum[r][o]);
      }
    }
    if (column < end) {
      for (int o = 0; o < OUTPUTS; ++o) {
        const Vector::Values w = load_tail<Hidden>(weight + o * weight_stride + column, end - column);
        for (int r = 0; r < ROWS; ++r)
          sum[r][o] = Vector::multiply_add(load_tail<Hidden>(hidden[r] + column, end - column), w, sum[r][o]);
      }
    }

    for (int r = 0; r < ROWS; ++r)
      for (int o = 0; o < OUTPUTS; ++o)
        partials[r][begin / FEATURE_CHUNK * 2 + o] = Vector::reduce(sum[r][o]);
  }
}

// Takes the rows from `row` on, as many times ROWS as there are; returns the first row left.
template <typename Hidden, typename Weight, int OUTPUTS, int ROWS>
TARGET ALWAYS_INLINE int64_t dot_blocks(const DotProducts& task, const DotProducts& next, int64_t row) {
  for (; row + ROWS <= task.row_count; row += ROWS) {
    const Hidden* hidden[ROWS];
    const Hidden* next_hidden[ROWS];
    float* partials[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const int64_t ahead = row + PREFETCH_BLOCKS * ROWS + r;
      hidden[r] = row_of<Hidden>(task, row + r);
      next_hidden[r] = ahead < task.row_count
          ? row_of<Hidden>(task, ahead)
          : row_of<Hidden>(next, std::min(ahead - task.row_count, next.row_count - 1));
      partials[r] = task.partials + (row + r) * task.partials_stride;
    }
    const void* next_weight = row == 0 ? next.weight : nullptr;
    dot_rows<Hidden, Weight, OUTPUTS, ROWS>(
        hidden, next_hidden, static_cast<const Weight*>(task.weight), static_cast<const Weight*>(next_weight),
        task.weight_stride, task.columns, partials);
  }
  return row;
}

template <typename Hidden, typename Weight, int OUTPUTS>
TARGET void dot_products(const DotProducts& task, const DotProducts& next) {
  const int64_t row = dot_blocks<Hidden, Weight, OUTPUTS, Vector::ROWS>(task, next, 0);
  dot_blocks<Hidden, Weight, OUTPUTS, 1>(task, next, row);
}

template <typename Hidden, typename Weight>
DotProductsFn select(int outputs) {
  return outputs == 2 ? &dot_products<Hidden, Weight, 2> : &dot_products<Hidden, Weight, 1>;
}

template <typename Hidden>
DotProductsFn select(WeightDtype weight, int outputs) {
  return weight == WeightDtype::float32 ? select<Hidden, float>(outputs) : select<Hidden, BFloat16>(outputs);
}

inline DotProductsFn select(HiddenDtype hidden, WeightDtype weight, int outputs) {
  switch (hidden) {
    case HiddenDtype::float32:
      return select<float>(weight, outputs);
    case HiddenDtype::bfloat16:
      return select<BFloat16>(weight, outputs);
    default:
      return select<Half>(weight, outputs);
  }
}
