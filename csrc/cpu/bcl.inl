// The Boundary Corrected Loss (BCL): the scores of all pixels, the step bcl_select, and what the selected pixels add to
// the gradient. loss_kernel.inl includes this file.

// The classes of a label row of the batch, and those that the two flips of a step bring there.
struct FlippedRow {
  const uint16_t *own, *by_rows;
  const int32_t* column_flip;

  template <typename Acc>
  FlippedRow(const LossArgs& args, const LossWork<Acc>& work, int64_t row, int index)
      : own(work.ids + row * args.W),
        by_rows(work.ids +
                (row - row % args.H + flip_index<int64_t>(row % args.H, args.bcl_step[index], args.H)) * args.W),
        column_flip(work.column_flip + index * args.W) {}
  uint16_t by_columns(int64_t x) const { return own[column_flip[x]]; }
  // Tells whether any of the columns xa..xb has another class after a flip.
  bool differs(int64_t xa, int64_t xb) const {
    unsigned any = 0;
    for (int64_t x = xa; x < xb; ++x) any |= own[x] ^ by_rows[x];
    for (int64_t x = xa; x < xb; ++x) any |= own[x] ^ own[column_flip[x]];
    return any != 0;
  }
};

constexpr int64_t kStretch = 32;  // pixels whose flips are looked at together: most have none

// Finds the scores of a tile's pixels, whose logits are z: the largest of the three losses, or -1 where one of the
// labels is ignored. A NaN loss stays NaN.
template <typename Acc>
static void score_tile(const LossArgs& args, const LossWork<Acc>& work, int index, int64_t n, Tile t, const Acc* z,
                       const Acc* nll, const Acc* m, const Acc* log_sum) {
  for (int64_t y = t.y, i = 0; y < t.y + t.rows; ++y) {
    const FlippedRow flipped(args, work, n * args.H + y, index);
    Acc* scores = work.scores + ((index * args.N + n) * args.H + y) * args.W;
    for (int64_t xa = t.xa; xa < t.xb; xa += kStretch) {
      const int64_t xb = t.xb - xa < kStretch ? t.xb : xa + kStretch;
      const bool differs = flipped.differs(xa, xb);
      for (int64_t x = xa; x < xb; ++x) scores[x] = nll[i + x - xa];
      for (int64_t x = xa; x < xb && differs; ++x) {
        if (flipped.own[x] == kIgnoredId) continue;
        const uint16_t others[2] = {flipped.by_rows[x], flipped.by_columns(x)};
        const int64_t k = i + x - xa;
        for (const uint16_t other : others) {
          if (other == flipped.own[x]) continue;
          if (other == kIgnoredId) {
            scores[x] = -1;
            break;
          }
          const Acc loss = (m[k] - z[other * work.pitch + k]) + log_sum[k];
          scores[x] = loss > scores[x] ? loss : scores[x];
        }
      }
      i += xb - xa;
    }
  }
}

// Finds the largest score of the neighbourhood of each pixel in the columns xa..xb of a row. Neighbourhoods are clipped
// at the border. The largest score of each column is found first, then that of neighbouring columns, so that the cost
// grows with the radius and not with its square.
template <typename Acc>
static void pool_scores(const LossArgs& args, const Acc* scores, int64_t row, int64_t xa, int64_t xb, Acc* pooled) {
  constexpr int64_t kColumns = kMaxTilePixels + 32;  // a whole tile with a usual radius around it
  const int64_t radius = args.bcl_nms_radius, y = row % args.H;
  const int64_t top = y < radius ? 0 : y - radius, bottom = args.H - 1 - y < radius ? args.H - 1 : y + radius;
  const int64_t left = xa < radius ? 0 : xa - radius, right = args.W - xb < radius ? args.W : xb + radius;
  const Acc* own = scores + row * args.W;
  for (int64_t x = xa; x < xb; ++x) pooled[x - xa] = own[x];
  for (int64_t begin = left; begin < right; begin += kColumns) {
    const int64_t end = right - begin < kColumns ? right : begin + kColumns;
    Acc column[kColumns];
    for (int64_t x = begin; x < end; ++x) column[x - begin] = own[x];
    for (int64_t v = top; v <= bottom; ++v) {
      const Acc* other = own + (v - y) * args.W;
      for (int64_t x = begin; x < end; ++x) column[x - begin] = larger(column[x - begin], other[x]);
    }
    // All offsets from one of the pixels to one of the columns lie between these two.
    const int64_t first = begin - xb + 1 < -radius ? -radius : begin - xb + 1;
    const int64_t last = end - 1 - xa > radius ? radius : end - 1 - xa;
    for (int64_t u = first; u <= last; ++u) {
      const int64_t from = begin - u < xa ? xa : begin - u, to = end - u > xb ? xb : end - u;
      for (int64_t x = from; x < to; ++x) pooled[x - xa] = larger(pooled[x - xa], column[x + u - begin]);
    }
  }
}

// Selects the pixels of a step: writes its bits in `selected`, and for each row the sum of the losses at its selected
// pixels and their number.
template <typename Acc, typename Source>
static void bcl_select_from(const LossArgs& args, const LossWork<Acc>& work, int index, int64_t begin, int64_t end,
                            TermPartial* partials) {
  const Source source(args, work);
  const Acc* max_logit = static_cast<const Acc*>(args.stats);
  const Acc* log_sum = max_logit + args.N * args.H * args.W;
  const Acc cutoff = static_cast<Acc>(args.bcl_cutoff);
  const Acc alpha = static_cast<Acc>(args.bcl_alpha), beta = static_cast<Acc>(args.bcl_beta);
  const Acc* scores = work.scores + index * args.N * args.H * args.W;
  uint8_t* selected = static_cast<uint8_t*>(args.selected);
  for (int64_t row = begin; row < end; ++row) {
    const FlippedRow flipped(args, work, row, index);
    TermPartial partial = {};
    for (int64_t xa = 0; xa < args.W; xa += kMaxTilePixels) {
      const int64_t xb = args.W - xa < kMaxTilePixels ? args.W : xa + kMaxTilePixels;
      Acc pooled[kMaxTilePixels];
      pool_scores(args, scores, row, xa, xb, pooled);
      uint8_t* to = selected + row * args.W + xa;
      const Acc* q = scores + row * args.W + xa;
      uint8_t hits[kMaxTilePixels];
      for (int64_t i = 0; i < xb - xa; ++i)
        hits[i] = (((q[i] > cutoff) & (q[i] == pooled[i])) | (q[i] != q[i])) << index;
      for (int64_t i = 0; i < xb - xa; ++i) to[i] = index == 0 ? hits[i] : to[i] | hits[i];
      for (int64_t x = xa; x < xb; ++x) {
        if (!hits[x - xa]) continue;
        const int64_t pixel = row * args.W + x;
        // The scores come from an earlier reading of labels that may have changed: there may be no class here now.
        const auto loss = [&](uint16_t id) -> Acc {
          if (id == kIgnoredId) return 0;
          return (max_logit[pixel] - source.entry(row / args.H, row % args.H, x, id)) + log_sum[pixel];
        };
        partial.sum += args.bcl_flipped ? alpha * loss(flipped.by_rows[x]) + beta * loss(flipped.by_columns(x))
                                        : loss(flipped.own[x]);
        ++partial.count;
      }
    }
    partials[row] = partial;
  }
}

template <typename Acc>
static void bcl_select(const LossArgs& args, const LossWork<Acc>& work, int index, int64_t begin, int64_t end,
                       TermPartial* partials) {
  if (args.resampled()) return bcl_select_from<Acc, Resampled<Acc>>(args, work, index, begin, end, partials);
  bcl_select_from<Acc, Direct<Acc>>(args, work, index, begin, end, partials);
}

// Adds the pulls towards the flipped labels to the factor of each selected pixel.
template <typename Acc>
static void add_flipped_factor(const LossArgs& args, const uint8_t* selected, int64_t count, Acc* factor) {
  const Acc pulls = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]) *
                    static_cast<Acc>(args.bcl_alpha + args.bcl_beta);
  for (int s = 0; s < args.bcl_steps; ++s)
    for (int64_t i = 0; i < count; ++i) factor[i] += selected[i] >> s & 1 ? pulls : 0;
}

// Subtracts the pulls towards the flipped labels from the gradient z of a tile.
template <typename Acc>
static void subtract_flipped(const LossArgs& args, const LossWork<Acc>& work, int64_t n, Tile t,
                             const uint8_t* selected, Acc* z) {
  const Acc scale = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  const Acc alpha = scale * static_cast<Acc>(args.bcl_alpha), beta = scale * static_cast<Acc>(args.bcl_beta);
  for (int s = 0; s < args.bcl_steps; ++s)
    for (int64_t k = 0; k < t.rows; ++k) {
      const FlippedRow flipped(args, work, n * args.H + t.y + k, s);
      for (int64_t x = t.xa; x < t.xb; ++x) {
        const int64_t i = k * (t.xb - t.xa) + x - t.xa;
        if (!(selected[i] >> s & 1)) continue;
        // The forward selected by an earlier reading of labels that may have changed.
        const uint16_t by_rows = flipped.by_rows[x], by_columns = flipped.by_columns(x);
        if (by_rows != kIgnoredId) z[by_rows * work.pitch + i] -= alpha;
        if (by_columns != kIgnoredId) z[by_columns * work.pitch + i] -= beta;
      }
    }
}
