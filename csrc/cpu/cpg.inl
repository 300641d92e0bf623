// The CPG loss: the steps cpg_edges, cpg_compare and cpg_residuals, and what CPG adds to the gradient. loss_kernel.inl
// includes this file.
//
// The window of an edge pixel holds few classes, and edge pixels lie side by side. So the work is done by runs of
// neighbouring edge pixels of a row, for one class after the other. Loops always go over kRunPixels pixels, however
// many the run has: a known number of iterations takes one or two vectors and has no remainder. G and its estimate Ĝ
// are multiplied by sobel_denominator, so that G is an integer and exact.

constexpr int64_t kRunPixels = 16;               // the most that a run has
constexpr int64_t kRunWindow = kRunPixels + 16;  // the columns of its windows, rounded up to whole vectors

// The integer taps of G_x and of G_y, by row and column offset.
template <int Radius>
struct SobelTaps {
  int x[2 * Radius + 1][2 * Radius + 1], y[2 * Radius + 1][2 * Radius + 1];
  constexpr SobelTaps() : x(), y() {
    for (int u = -Radius; u <= Radius; ++u)
      for (int v = -Radius; v <= Radius; ++v) {
        x[u + Radius][v + Radius] = sobel_tap(Radius, v, u);
        y[u + Radius][v + Radius] = sobel_tap(Radius, u, v);
      }
  }
};

// Calls f(radius) with the radius as a type, so that loops over its taps have a known length.
template <int Radius>
struct RadiusConstant {
  static constexpr int value = Radius;
};
template <typename F>
BCMF_INLINE void with_radius(const LossArgs& args, F f) {
  if (args.cpg_radius == 1) return f(RadiusConstant<1>());
  if (args.cpg_radius == 2) return f(RadiusConstant<2>());
  f(RadiusConstant<3>());
}

template <typename Acc, int Radius>
static void cpg_edges_of(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = row % args.H;
    const uint16_t* own = work.ids + row * args.W;
    for (int64_t xa = 0; xa < args.W; xa += kMaxTilePixels) {
      const int64_t xb = args.W - xa < kMaxTilePixels ? args.W : xa + kMaxTilePixels;
      const int64_t left = clamp(xa - Radius, args.W), right = clamp(xb - 1 + Radius, args.W) + 1;
      // These are the lowest and the highest label of each column in the windows' rows, with `Radius` more columns on
      // both sides.
      uint16_t low[kMaxTilePixels + 2 * Radius], high[kMaxTilePixels + 2 * Radius];
      const int64_t from = xa - Radius, width = xb - xa + 2 * Radius;
      for (int64_t i = left - from; i < right - from; ++i) low[i] = high[i] = own[from + i];
      for (int64_t u = -Radius; u <= Radius; ++u) {
        const uint16_t* other = own + (clamp(y + u, args.H) - y) * args.W;
        for (int64_t i = left - from; i < right - from; ++i) {
          low[i] = other[from + i] < low[i] ? other[from + i] : low[i];
          high[i] = other[from + i] > high[i] ? other[from + i] : high[i];
        }
      }
      for (int64_t i = 0; i < left - from; ++i) low[i] = low[left - from], high[i] = high[left - from];
      for (int64_t i = right - from; i < width; ++i) low[i] = low[right - from - 1], high[i] = high[right - from - 1];
      for (int64_t i = 0; i < xb - xa; ++i) {
        uint16_t lowest = low[i], highest = high[i];
        for (int v = 1; v <= 2 * Radius; ++v) {
          lowest = low[i + v] < lowest ? low[i + v] : lowest;
          highest = high[i + v] > highest ? high[i + v] : highest;
        }
        const uint16_t worst = args.cpg_window ? highest : own[xa + i];
        work.edges[row * args.W + xa + i] = lowest != highest && worst != kIgnoredId;
      }
    }
  }
}

// Finds the edges of the rows begin..end: pixels whose window holds more than one label and, if cpg_window, no ignored
// one; otherwise only the pixel itself must be valid.
template <typename Acc>
static void cpg_edges(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
  with_radius(args, [&](auto radius) { cpg_edges_of<Acc, radius.value>(args, work, begin, end); });
}

// The run of edge pixels x0..x1 of a row: the labels in its windows, and for one class p there, G and Ĝ. Pixels of the
// run that are no edges take part in the arithmetic, but is_edge keeps their G at 0.
template <typename Acc, int Radius, typename Source>
struct EdgeRunGradients {
  static constexpr int kSize = 2 * Radius + 1;
  static constexpr SobelTaps<Radius> kTaps = {};
  const LossArgs& args;
  const LossWork<Acc>& work;
  const Source& source;
  int64_t n, y, x0, x1;
  uint16_t labels[kSize][kRunWindow];
  uint16_t classes[kSize * kRunWindow];
  int64_t num_classes;
  int32_t is_edge[kRunPixels];  // all bits or none
  Acc p[kSize][kRunWindow];
  int32_t gx[kRunPixels], gy[kRunPixels];
  Acc px[kRunPixels], py[kRunPixels];

  void begin(int64_t n_, int64_t y_, int64_t x0_, int64_t x1_) {
    n = n_, y = y_, x0 = x0_, x1 = x1_;
    const uint8_t* edges = work.edges + (n * args.H + y) * args.W;
    BCMF_LANES
    for (int64_t i = 0; i < kRunPixels; ++i) is_edge[i] = x0 + i < x1 && edges[x0 + i] ? -1 : 0;
    num_classes = 0;
    uint16_t last = kIgnoredId;
    for (int64_t u = 0; u < kSize; ++u) {
      const uint16_t* row = work.ids + (n * args.H + clamp(y + u - Radius, args.H)) * args.W;
      BCMF_LANES
      for (int64_t i = 0; i < kRunWindow; ++i) labels[u][i] = kIgnoredId;
      for (int64_t i = 0; i < x1 - x0 + 2 * Radius; ++i) {
        const uint16_t id = labels[u][i] = row[clamp(x0 - Radius + i, args.W)];
        if (id != last && id != kIgnoredId) add_class(id);
        last = id;
      }
    }
  }

  // Finds G of a class, which is 0 where there is no edge, and tells whether any of it is not 0.
  bool find_truth(uint16_t c) {
    BCMF_LANES
    for (int64_t i = 0; i < kRunPixels; ++i) gx[i] = gy[i] = 0;
    for (int u = 0; u < kSize; ++u)
      for (int v = 0; v < kSize; ++v) {
        const int tap_x = kTaps.x[u][v], tap_y = kTaps.y[u][v];
        const uint16_t* row = labels[u] + v;
        BCMF_LANES
        for (int64_t i = 0; i < kRunPixels; ++i) {
          const int32_t is_class = row[i] == c ? is_edge[i] : 0;
          gx[i] += tap_x & is_class;
          gy[i] += tap_y & is_class;
        }
      }
    int32_t any = 0;
    BCMF_LANES
    for (int64_t i = 0; i < kRunPixels; ++i) any |= gx[i] | gy[i];
    return any != 0;
  }

  // Finds Ĝ of a class.
  void find_estimate(uint16_t c) {
    const int64_t from = x0 - Radius, width = x1 - x0 + 2 * Radius;
    const int64_t left = clamp(from, args.W), right = clamp(from + width - 1, args.W) + 1;
    for (int64_t u = 0; u < kSize; ++u) {
      const int64_t row = clamp(y + u - Radius, args.H);
      const Acc* m = static_cast<const Acc*>(args.stats) + (n * args.H + row) * args.W + left;
      const Acc* log_sum = m + args.N * args.H * args.W;
      Acc exponents[kRunWindow] = {};
      Acc* inner = exponents + (left - from);
      source.entries(n, row, left, right, c, inner);
      for (int64_t i = 0; i < right - left; ++i) inner[i] = (inner[i] - m[i]) - log_sum[i];
      for (int64_t i = 0; i < left - from; ++i) exponents[i] = inner[0];
      for (int64_t i = right - from; i < width; ++i) exponents[i] = exponents[right - from - 1];
      for (int64_t i = 0; i < kRunWindow; i += kWidth<Acc>)
        store_vector(exp_nonpositive(load_vector(exponents + i)), p[u] + i);
    }
    BCMF_LANES
    for (int64_t i = 0; i < kRunPixels; ++i) px[i] = py[i] = 0;
    for (int u = 0; u < kSize; ++u)
      for (int v = 0; v < kSize; ++v) {
        const Acc tap_x = static_cast<Acc>(kTaps.x[u][v]), tap_y = static_cast<Acc>(kTaps.y[u][v]);
        const Acc* row = p[u] + v;
        BCMF_LANES
        for (int64_t i = 0; i < kRunPixels; ++i) {
          px[i] += tap_x * row[i];
          py[i] += tap_y * row[i];
        }
      }
  }

 private:
  void add_class(uint16_t id) {
    for (int64_t k = 0; k < num_classes; ++k)
      if (classes[k] == id) return;
    classes[num_classes++] = id;
  }
};

// Calls f(gradients, c) for every run of a row of the batch and every class that has an edge there.
template <typename Acc, int Radius, typename Source, typename F>
static void for_edge_runs(const LossArgs& args, const LossWork<Acc>& work, const Source& source, int64_t row, F f) {
  EdgeRunGradients<Acc, Radius, Source> gradients = {args, work, source};
  const uint8_t* edges = work.edges + row * args.W;
  for (int64_t x = 0; x < args.W; ++x) {
    if (!edges[x]) continue;
    int64_t end = x + 1;
    for (int64_t i = end; i < args.W && i < x + kRunPixels; ++i)
      if (edges[i]) end = i + 1;
    gradients.begin(row / args.H, row % args.H, x, end);
    for (int64_t k = 0; k < gradients.num_classes; ++k) {
      const uint16_t c = gradients.classes[k];
      if (!gradients.find_truth(c)) continue;
      gradients.find_estimate(c);
      f(gradients, c);
    }
    x = end - 1;
  }
}

// Finds for each row the sum of (G − Ĝ)², and its part of |M|.
template <typename Acc, int Radius, typename Source>
static void cpg_compare_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end,
                             TermPartial* partials) {
  const Source source(args, work);
  const Acc unit = 1 / static_cast<Acc>(sobel_denominator(Radius));
  for (int64_t row = begin; row < end; ++row) {
    TermPartial partial = {};
    for_edge_runs<Acc, Radius>(args, work, source, row, [&](const auto& run, int64_t) {
      Acc squares[kRunPixels];
      int32_t counts[kRunPixels];
      BCMF_LANES
      for (int64_t i = 0; i < kRunPixels; ++i) {
        const Acc dx = run.gx[i] != 0 ? unit * (static_cast<Acc>(run.gx[i]) - run.px[i]) : 0;
        const Acc dy = run.gy[i] != 0 ? unit * (static_cast<Acc>(run.gy[i]) - run.py[i]) : 0;
        squares[i] = dx * dx + dy * dy;
        counts[i] = (run.gx[i] != 0) + (run.gy[i] != 0);
      }
      for (int64_t half = kRunPixels / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) squares[i] += squares[i + half], counts[i] += counts[i + half];
      partial.sum += squares[0];
      partial.count += counts[0];
    });
    partials[row] = partial;
  }
}

// Finds for each row the residuals: the derivatives of the total by Ĝ times sobel_denominator.
template <typename Acc, int Radius, typename Source>
static void cpg_residuals_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
  const Source source(args, work);
  const Acc count = static_cast<const Acc*>(args.summary)[kEdges];
  const Acc upstream = *static_cast<const Acc*>(args.grad_total);
  const Acc denominator = static_cast<Acc>(sobel_denominator(Radius)) * static_cast<Acc>(sobel_denominator(Radius));
  const Acc scale = count != 0 ? 2 * static_cast<Acc>(args.cpg_weight) * upstream / count / denominator : 0;
  for (int64_t row = begin; row < end; ++row)
    for_edge_runs<Acc, Radius>(args, work, source, row, [&](const auto& run, int64_t c) {
      const int64_t length = run.x1 - run.x0;
      Acc* residuals = add_edge_run(work.edge_runs[row], run.x0, run.x1, c);
      for (int64_t i = 0; i < length; ++i) {
        residuals[i] = run.gx[i] != 0 ? scale * (run.px[i] - static_cast<Acc>(run.gx[i])) : 0;
        residuals[length + i] = run.gy[i] != 0 ? scale * (run.py[i] - static_cast<Acc>(run.gy[i])) : 0;
      }
    });
}

template <typename Acc>
static void cpg_compare(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end,
                        TermPartial* partials) {
  with_radius(args, [&](auto radius) {
    if (args.resampled()) return cpg_compare_from<Acc, radius.value, Resampled<Acc>>(args, work, begin, end, partials);
    cpg_compare_from<Acc, radius.value, Direct<Acc>>(args, work, begin, end, partials);
  });
}

template <typename Acc>
static void cpg_residuals(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
  with_radius(args, [&](auto radius) {
    if (args.resampled()) return cpg_residuals_from<Acc, radius.value, Resampled<Acc>>(args, work, begin, end);
    cpg_residuals_from<Acc, radius.value, Direct<Acc>>(args, work, begin, end);
  });
}

// CPG's part of the gradient of a tile's logits, p (b − s), where b is the derivative of the total by p, which is 0
// except near edges, and s = Σ p b is the pixel's share.
template <typename Acc>
struct SparseGradient {
  const LossArgs& args;
  const LossWork<Acc>& work;
  Acc* b;            // (C, pitch), 0 but for the entries; `multiply` makes it p b
  int32_t* entries;  // places in `b`, in the order in which they came
  uint8_t* known;    // (C, pitch): 1 where there is an entry
  int64_t count = 0;

  SparseGradient(const LossArgs& args, const LossWork<Acc>& work, Acc* scratch) : args(args), work(work), b(scratch) {
    const int64_t tile_size = args.C * work.pitch;
    entries = reinterpret_cast<int32_t*>(b + tile_size);
    known = reinterpret_cast<uint8_t*>(entries + tile_size);
    if (!work.edge_runs) return;
    for (int64_t i = 0; i < tile_size; ++i) b[i] = 0, known[i] = 0;
  }

  // Collects the entries of a tile, and tells whether there are any.
  bool collect(int64_t n, Tile t) {
    count = 0;
    for (int64_t k = 0; k < t.rows; ++k)
      with_radius(args, [&](auto radius) { collect_row<radius.value>(n, t.y + k, t, k * (t.xb - t.xa)); });
    return count > 0;
  }

  // Multiplies the entries by p, which z holds, and takes the share from the factor of each pixel (step cpg_shares).
  void multiply(const Acc* z, Acc* factor) {
    for (int64_t k = 0; k < count; ++k) {
      const int32_t at = entries[k];
      b[at] *= z[at];
      factor[at % work.pitch] -= b[at];
    }
  }

  // Adds the entries to the gradient z of the tile, and forgets them (step sparse_backward).
  void add_to(Acc* z) {
    for (int64_t k = 0; k < count; ++k) {
      const int32_t at = entries[k];
      z[at] += b[at];
      b[at] = 0, known[at] = 0;
    }
  }

 private:
  // Collects the entries of label row y, whose pixels begin at `first` in the tile, from all rows whose windows reach
  // it. Borders are replicated, so that a row at the border also stands for those beyond it.
  template <int Radius>
  void collect_row(int64_t n, int64_t y, Tile t, int64_t first) {
    for (int64_t from = clamp(y - Radius, args.H); from <= clamp(y + Radius, args.H); ++from) {
      const RowEdgeRuns<Acc>& row = work.edge_runs[n * args.H + from];
      if (row.count == 0) continue;
      constexpr SobelTaps<Radius> kTaps = {};
      Acc taps_x[2 * Radius + 1] = {}, taps_y[2 * Radius + 1] = {};
      for (int u = -Radius; u <= Radius; ++u)
        if (clamp(from + u, args.H) == y)
          for (int v = 0; v <= 2 * Radius; ++v) {
            taps_x[v] += static_cast<Acc>(kTaps.x[u + Radius][v]);
            taps_y[v] += static_cast<Acc>(kTaps.y[u + Radius][v]);
          }
      for (int64_t k = 0; k < row.count; ++k) {
        const EdgeRun& run = row.runs[k];
        if (run.x1 + Radius > t.xa && run.x0 - Radius < t.xb)
          add<Radius>(run, row.residuals + run.first, taps_x, taps_y, t, first);
      }
    }
  }

  // Adds to the entries of the label row what the residuals of a run give to the pixels in its windows.
  template <int Radius>
  void add(const EdgeRun& run, const Acc* residuals, const Acc* taps_x, const Acc* taps_y, Tile t, int64_t first) {
    const int64_t length = run.x1 - run.x0, width = length + 2 * Radius;
    Acc rx[kRunPixels] = {}, ry[kRunPixels] = {}, sums[kRunWindow] = {};
    for (int64_t i = 0; i < length; ++i) rx[i] = residuals[i], ry[i] = residuals[length + i];
    for (int v = 0; v <= 2 * Radius; ++v) BCMF_LANES
    for (int64_t i = 0; i < kRunPixels; ++i) sums[i + v] += taps_x[v] * rx[i] + taps_y[v] * ry[i];
    for (int64_t i = 0; i < width; ++i) {
      const int64_t x = clamp(run.x0 - Radius + i, args.W);
      if (x < t.xa || x >= t.xb) continue;
      const int64_t at = run.c * work.pitch + first + x - t.xa;
      b[at] += sums[i];
      if (!known[at]) entries[count++] = static_cast<int32_t>(at);
      known[at] = 1;
    }
  }
};
