// Included by `for_each_isa.h`: no include guard.
//
// A pass over the weights takes DOT_ROWS rows. Every row is reduced in an order that its number of columns fixes,
// however many rows share the pass: that makes a score independent of its batch.

template <typename Hidden>
const Hidden* row_of(const DotProducts& task, int64_t row) {
  return static_cast<const Hidden*>(task.hidden) + task.rows[row] * task.hidden_stride;
}

template <typename Hidden, typename Weight, int OUTPUTS, bool SQUARES, int ROWS>
TARGET void dot_rows(
    const Hidden* const* hidden, const Hidden* const* next_hidden, const Weight* weight, const Weight* next_weight,
    int64_t weight_stride, int64_t columns, float* const* partials) {
  constexpr int64_t STEP = Vector::STEP;
  constexpr int SUMS = OUTPUTS + SQUARES;  // the last one that of squares
  for (int64_t begin = 0; begin < columns; begin += FEATURE_CHUNK) {
    const int64_t end = std::min(begin + FEATURE_CHUNK, columns);
    Vector::Values sum[ROWS][SUMS];
    for (int r = 0; r < ROWS; ++r)
      for (int s = 0; s < SUMS; ++s)
        sum[r][s] = Vector::zero();

    int64_t column = begin;
    for (; column + STEP <= end; column += STEP) {
      Vector::Values w[SUMS];
      for (int o = 0; o < OUTPUTS; ++o) {
        if (next_weight != nullptr)
          prefetch<STEP * sizeof(Weight)>(next_weight + o * weight_stride + column);
        w[o] = Vector::load<Hidden>(weight + o * weight_stride + column);
      }
      for (int r = 0; r < ROWS; ++r) {
        prefetch<STEP * sizeof(Hidden)>(next_hidden[r] + column);
        const Vector::Values h = Vector::load<Hidden>(hidden[r] + column);
        for (int s = 0; s < SUMS; ++s)
          sum[r][s] = Vector::multiply_add(h, s < OUTPUTS ? w[s] : h, sum[r][s]);
      }
    }
    if (column < end) {
      for (int r = 0; r < ROWS; ++r) {
        const Vector::Values h = load_tail<Hidden>(hidden[r] + column, end - column);
        for (int s = 0; s < SUMS; ++s) {
          const Vector::Values w =
              s < OUTPUTS ? load_tail<Hidden>(weight + s * weight_stride + column, end - column) : h;
          sum[r][s] = Vector::multiply_add(h, w, sum[r][s]);
        }
      }
    }

    for (int r = 0; r < ROWS; ++r) {
      float* chunk = partials[r] + begin / FEATURE_CHUNK * chunk_floats(SQUARES);
      for (int s = 0; s < SUMS; ++s)
        chunk[s < OUTPUTS ? s : 2] = Vector::reduce(sum[r][s]);
    }
  }
}

// Takes the rows from `row` on, as many times ROWS as there are; returns the first row left.
template <typename Hidden, typename Weight, int OUTPUTS, bool SQUARES, int ROWS>
TARGET ALWAYS_INLINE int64_t dot_blocks(const DotProducts& task, const DotProducts& next, int64_t row) {
  for (; row + ROWS <= task.row_count; row += ROWS) {
    const Hidden* hidden[ROWS];
    const Hidden* next_hidden[ROWS];
    float* partials[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const int64_t ahead = row + PREFETCH_PASSES * ROWS + r;
      hidden[r] = row_of<Hidden>(task, row + r);
      next_hidden[r] = ahead < task.row_count
          ? row_of<Hidden>(task, ahead)
          : row_of<Hidden>(next, std::min(ahead - task.row_count, next.row_count - 1));
      partials[r] = task.partials + (row + r) * task.partials_stride;
    }
    const void* next_weight = row == 0 && next.weight != task.weight ? next.weight : nullptr;
    dot_rows<Hidden, Weight, OUTPUTS, SQUARES, ROWS>(
        hidden, next_hidden, static_cast<const Weight*>(task.weight), static_cast<const Weight*>(next_weight),
        task.weight_stride, task.columns, partials);
  }
  return row;
}

template <typename Hidden, typename Weight, int OUTPUTS, bool SQUARES>
TARGET void dot_products(const DotProducts& task, const DotProducts& next) {
  const int64_t row = dot_blocks<Hidden, Weight, OUTPUTS, SQUARES, Vector::DOT_ROWS>(task, next, 0);
  dot_blocks<Hidden, Weight, OUTPUTS, SQUARES, 1>(task, next, row);
}

template <typename Hidden, typename Weight>
DotProductsFn select(int outputs, bool squares) {
  if (outputs == 2)
    return squares ? &dot_products<Hidden, Weight, 2, true> : &dot_products<Hidden, Weight, 2, false>;
  if (outputs == 1)
    return squares ? &dot_products<Hidden, Weight, 1, true> : &dot_products<Hidden, Weight, 1, false>;
  return &dot_products<Hidden, float, 0, true>;
}

template <typename Hidden>
DotProductsFn select(WeightDtype weight, int outputs, bool squares) {
  return weight == WeightDtype::float32 ? select<Hidden, float>(outputs, squares)
                                        : select<Hidden, BFloat16>(outputs, squares);
}

inline DotProductsFn select(HiddenDtype hidden, WeightDtype weight, int outputs, bool squares) {
  switch (hidden) {
    case HiddenDtype::float32:
      return select<float>(weight, outputs, squares);
    case HiddenDtype::bfloat16:
      return select<BFloat16>(weight, outputs, squares);
    default:
      return select<Half>(weight, outputs, squares);
  }
}
