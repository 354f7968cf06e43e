// Included by `for_each_isa.h`: no include guard.
//
// Every column of every output is summed row by row, in blocks of SUM_BLOCK rows whose sums are then added up: in one
// order whatever the columns of a task, and with an error that grows with rows / SUM_BLOCK.

template <typename Hidden>
const Hidden* row_of(const WeightedSums& task, int64_t row) {
  return static_cast<const Hidden*>(task.hidden) + row * task.hidden_stride;
}

// Adds rows [row, row + ROWS) to the sums of a block, of OUTPUTS outputs from `output` on.
template <typename Hidden, int OUTPUTS, int ROWS>
TARGET void add_rows(
    const WeightedSums& task, const WeightedSums& next, int64_t row, int64_t output, float* sums, int64_t sums_stride) {
  constexpr int64_t STEP = Vector::STEP;
  const Hidden* hidden[ROWS];
  const Hidden* next_hidden[ROWS];
  Vector::Scalar factor[ROWS][OUTPUTS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t ahead = row + PREFETCH_PASSES * ROWS + r;
    hidden[r] = row_of<Hidden>(task, row + r);
    next_hidden[r] = ahead < task.rows ? row_of<Hidden>(task, ahead)
                                       : row_of<Hidden>(next, std::min(ahead - task.rows, next.rows - 1));
    for (int o = 0; o < OUTPUTS; ++o)
      factor[r][o] = Vector::broadcast(task.factors[(row + r) * task.outputs + output + o]);
  }

  int64_t column = 0;
  for (; column + STEP <= task.columns; column += STEP) {
    Vector::Values sum[OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o)
      sum[o] = Vector::load_sums(sums + o * sums_stride + column);
    for (int r = 0; r < ROWS; ++r) {
      if (output == 0)
        prefetch<STEP * sizeof(Hidden)>(next_hidden[r] + column);
      const Vector::Values h = Vector::load<Hidden>(hidden[r] + column);
      for (int o = 0; o < OUTPUTS; ++o)
        sum[o] = Vector::multiply_add(h, factor[r][o], sum[o]);
    }
    for (int o = 0; o < OUTPUTS; ++o)
      Vector::store_sums(sums + o * sums_stride + column, sum[o]);
  }
  if (column < task.columns) {
    for (int o = 0; o < OUTPUTS; ++o) {
      Vector::Values sum = Vector::load_sums(sums + o * sums_stride + column);
      for (int r = 0; r < ROWS; ++r)
        sum = Vector::multiply_add(load_tail<Hidden>(hidden[r] + column, task.columns - column), factor[r][o], sum);
      Vector::store_sums(sums + o * sums_stride + column, sum);
    }
  }
}

template <typename Hidden, int OUTPUTS>
TARGET void add_tile(
    const WeightedSums& task, const WeightedSums& next, int64_t begin, int64_t end, int64_t output, float* sums,
    int64_t sums_stride) {
  int64_t row = begin;
  for (; row + Vector::SUM_ROWS <= end; row += Vector::SUM_ROWS)
    add_rows<Hidden, OUTPUTS, Vector::SUM_ROWS>(task, next, row, output, sums, sums_stride);
  for (; row < end; ++row)
    add_rows<Hidden, OUTPUTS, 1>(task, next, row, output, sums, sums_stride);
}

// Adds the sums of a block to those of the blocks before it.
template <typename Hidden>
TARGET void add_block(const float* block, int64_t columns, bool first, float* sums) {
  constexpr int64_t STEP = Vector::STEP;
  int64_t column = 0;
  for (; column + STEP <= columns; column += STEP) {
    Vector::Values sum = Vector::load_sums(block + column);
    if (!first)
      sum = Vector::add(Vector::load<Hidden>(sums + column), sum);
    Vector::store<Hidden>(sums + column, sum);
  }
  if (column < columns) {
    Vector::Values sum = Vector::load_sums(block + column);
    if (!first)
      sum = Vector::add(load_tail<Hidden>(sums + column, columns - column), sum);
    store_tail<Hidden>(sums + column, sum, columns - column);
  }
}

template <typename Hidden>
TARGET void weighted_sums(const WeightedSums& task, const WeightedSums& next, float* scratch) {
  const int64_t stride = padded_columns(task.columns);
  for (int64_t block = 0; block < task.rows; block += SUM_BLOCK) {
    const int64_t block_end = std::min(block + SUM_BLOCK, task.rows);
    std::fill_n(scratch, task.outputs * stride, 0.0f);
    for (int64_t tile = block; tile < block_end; tile += TILE_ROWS) {
      const int64_t tile_end = std::min(tile + TILE_ROWS, block_end);
      int64_t output = 0;
      for (; output + 2 <= task.outputs; output += 2)
        add_tile<Hidden, 2>(task, next, tile, tile_end, output, scratch + output * stride, stride);
      if (output < task.outputs)
        add_tile<Hidden, 1>(task, next, tile, tile_end, output, scratch + output * stride, stride);
    }
    for (int64_t output = 0; output < task.outputs; ++output)
      add_block<Hidden>(
          scratch + output * stride, task.columns, block == 0, task.sums + output * task.sums_stride);
  }
}

inline WeightedSumsFn select(HiddenDtype hidden) {
  switch (hidden) {
    case HiddenDtype::float32:
      return &weighted_sums<float>;
    case HiddenDtype::bfloat16:
      return &weighted_sums<BFloat16>;
    default:
      return &weighted_sums<Half>;
  }
}
