// The CPG loss: the steps cpg_edges, cpg_compare and cpg_residuals, and what CPG adds to the gradient. loss_kernel.inl
// includes this file.
//
// The window of an edge pixel holds few classes, and edge pixels lie side by side. So the work is done by runs, for one
// class after the other: a run begins with an edge pixel, and all windows of a run have kRunWindow columns together,
// which are one or a few vectors. Runs are equally long, whatever they hold: loops have a known number of iterations,
// and values stay in registers. G and its estimate Ĝ are multiplied by sobel_denominator, so that G is an integer and
// exact.

template <int Radius>
constexpr int64_t kRunPixels = kRunWindow - 2 * Radius;

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

// Finds the edges among the columns xa..xb, kMaxTilePixels at most, of a row of the batch: pixels whose window holds
// more than one label and, if cpg_window, no ignored one; otherwise only the pixel itself must be valid.
template <int Radius, typename Acc>
static void cpg_edges(const LossArgs& args, const LossWork<Acc>& work, int64_t row, int64_t xa, int64_t xb,
                      uint8_t* edges) {
  const int64_t y = row % args.H;
  const uint16_t* own = work.ids + row * args.W;
  const int64_t left = clamp(xa - Radius, args.W), right = clamp(xb - 1 + Radius, args.W) + 1;
  // These are the lowest and the highest label of each column in the windows' rows, with `Radius` more columns on both
  // sides.
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
  // In the loop nothing is read of args, which for all the compiler knows the bytes that are written could change.
  const uint16_t in_window = args.cpg_window ? kIgnoredId : 0;
  for (int64_t i = 0; i < xb - xa; ++i) {
    uint16_t lowest = low[i], highest = high[i];
    BCMF_UNROLL
    for (int v = 1; v <= 2 * Radius; ++v) {
      lowest = low[i + v] < lowest ? low[i + v] : lowest;
      highest = high[i + v] > highest ? high[i + v] : highest;
    }
    const uint16_t worst = (highest & in_window) | own[xa + i];  // kIgnoredId has all bits
    edges[i] = (lowest != highest) & (worst != kIgnoredId);
  }
}

// The pixels of a row from x0 on: the labels in their windows, and for one class G and Ĝ. Pixels that are no edges take
// part in the arithmetic, but is_edge keeps their G at 0.
template <typename Acc, int Radius, typename Source>
struct EdgeRunGradients {
  static constexpr int kSize = 2 * Radius + 1;
  static constexpr SobelTaps<Radius> kTaps = {};
  const LossArgs& args;
  const LossWork<Acc>& work;
  typename Source::template Window<kSize> window;
  int64_t x0;
  Columns<Lane<Acc>> is_edge;  // all bits or none
  Columns<Lane<Acc>> labels[kSize];
  Columns<Acc> m[kSize], log_sum[kSize];
  Columns<Acc> gx, gy;  // 0 where there is no edge
  Columns<Acc> px, py;

  // edges: 1 for each of the pixels that is one, else 0.
  void begin(int64_t n, int64_t y, int64_t x, const uint8_t* edges) {
    x0 = x;
    Lane<Acc> bits[kRunWindow] = {};
    for (int64_t i = 0; i < kRunPixels<Radius>; ++i) bits[i] = -edges[i];
    is_edge = load_columns(bits);
    const Acc* stats = static_cast<const Acc*>(args.stats);
    for (int u = 0; u < kSize; ++u) {
      const int64_t row = (n * args.H + clamp(y + u - Radius, args.H)) * args.W;
      labels[u] = read_columns<Lane<Acc>>(work.ids + row, x - Radius, args.W);
      m[u] = read_columns<Acc>(stats + row, x - Radius, args.W);
      log_sum[u] = read_columns<Acc>(stats + args.N * args.H * args.W + row, x - Radius, args.W);
    }
    window.begin(n, y, x - Radius);
  }

  // Returns the lowest class in the windows above `last`, or kIgnoredId.
  Lane<Acc> next_class(Lane<Acc> last) const {
    Vector<Lane<Acc>> lowest = splat<Lane<Acc>>(kIgnoredId);
    for (const Columns<Lane<Acc>>& row : labels)
      for (const Vector<Lane<Acc>> label : row.parts) lowest = (label > last) & (label < lowest) ? label : lowest;
    Lane<Acc> lanes[kWidth<Acc>];
    store_vector(lowest, lanes);
    Lane<Acc> found = kIgnoredId;
    BCMF_LANES
    for (int64_t i = 0; i < kWidth<Acc>; ++i) found = lanes[i] < found ? lanes[i] : found;
    return found;
  }

  // Finds G of a class.
  void find_truth(Lane<Acc> c) {
    Columns<Acc> is_class[kSize];
    for (int u = 0; u < kSize; ++u)
      for (int64_t k = 0; k < kParts<Acc>; ++k)
        is_class[u].parts[k] = labels[u].parts[k] == c ? splat(Acc(1)) : Vector<Acc>{};
    correlate(is_class, gx, gy);
    for (int64_t k = 0; k < kParts<Acc>; ++k) {
      gx.parts[k] = is_edge.parts[k] ? gx.parts[k] : Vector<Acc>{};
      gy.parts[k] = is_edge.parts[k] ? gy.parts[k] : Vector<Acc>{};
    }
  }

  // Finds Ĝ of a class.
  void find_estimate(Lane<Acc> c) {
    Columns<Acc> p[kSize];
    window.read(c, p);
    for (int u = 0; u < kSize; ++u)
      for (int64_t k = 0; k < kParts<Acc>; ++k)
        p[u].parts[k] = exp_nonpositive((p[u].parts[k] - m[u].parts[k]) - log_sum[u].parts[k]);
    correlate(p, px, py);
  }

 private:
  // Correlates the rows of a map with the kernels. Taps to the left and to the right differ in their sign at most: so
  // the sums over each column of a window come first, and serve both sides.
  static void correlate(const Columns<Acc> (&rows)[kSize], Columns<Acc>& x, Columns<Acc>& y) {
    x = {};
    y = shifted<Radius>(add_rows(rows, [](int u) { return kTaps.y[u][Radius]; }));
    unrolled<Radius>([&](auto index) {
      constexpr int v = index.value + 1;
      const Columns<Acc> odd = add_rows(rows, [](int u) { return kTaps.x[u][Radius + v]; });
      const Columns<Acc> even = add_rows(rows, [](int u) { return kTaps.y[u][Radius + v]; });
      const Columns<Acc> odd_right = shifted<Radius + v>(odd), odd_left = shifted<Radius - v>(odd);
      const Columns<Acc> even_right = shifted<Radius + v>(even), even_left = shifted<Radius - v>(even);
      for (int64_t k = 0; k < kParts<Acc>; ++k) {
        x.parts[k] += odd_right.parts[k] - odd_left.parts[k];
        y.parts[k] += even_right.parts[k] + even_left.parts[k];
      }
    });
  }
  // Adds up the rows, each times its tap.
  template <typename Tap>
  static Columns<Acc> add_rows(const Columns<Acc> (&rows)[kSize], Tap tap) {
    Columns<Acc> sum = {};
    BCMF_UNROLL
    for (int u = 0; u < kSize; ++u)
      for (int64_t k = 0; k < kParts<Acc>; ++k) sum.parts[k] += static_cast<Acc>(tap(u)) * rows[u].parts[k];
    return sum;
  }
};

// Calls f(gradients, c) for every run of a row of the batch and every class in its windows.
template <typename Acc, int Radius, typename Source, typename F>
static void for_edge_runs(const LossArgs& args, const LossWork<Acc>& work, const Source& source, int64_t row, F f) {
  EdgeRunGradients<Acc, Radius, Source> gradients{args, work, {source}};
  for (int64_t xa = 0; xa < args.W; xa += kMaxTilePixels) {
    const int64_t xb = args.W - xa < kMaxTilePixels ? args.W : xa + kMaxTilePixels;
    uint8_t edges[kMaxTilePixels + kRunWindow];
    cpg_edges<Radius>(args, work, row, xa, xb, edges);
    for (int64_t i = xb - xa; i < xb - xa + kRunWindow; ++i) edges[i] = 0;
    for (int64_t x = xa; x < xb; ++x) {
      if (!edges[x - xa]) continue;
      gradients.begin(row / args.H, row % args.H, x, edges + (x - xa));
      for (Lane<Acc> c = gradients.next_class(-1); c != kIgnoredId; c = gradients.next_class(c)) {
        gradients.find_truth(c);
        gradients.find_estimate(c);
        f(gradients, c);
      }
      x += kRunPixels<Radius> - 1;
    }
  }
}

// Finds for each row the sum of (G − Ĝ)², and its part of |M|.
template <typename Acc, int Radius, typename Source>
static void cpg_compare_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end,
                             TermPartial* partials) {
  const Source source(args, work);
  const Acc unit = 1 / static_cast<Acc>(sobel_denominator(Radius));
  for (int64_t row = begin; row < end; ++row) {
    Sums<Acc> sums = {};
    Mask<Acc> counts = {};
    for_edge_runs<Acc, Radius>(args, work, source, row, [&](const auto& run, int64_t) {
      for (int64_t k = 0; k < kParts<Acc>; ++k) {
        const Vector<Acc> gx = run.gx.parts[k], gy = run.gy.parts[k];
        const Vector<Acc> dx = gx != 0 ? unit * (gx - run.px.parts[k]) : Vector<Acc>{};
        const Vector<Acc> dy = gy != 0 ? unit * (gy - run.py.parts[k]) : Vector<Acc>{};
        sums += __builtin_convertvector(dx * dx + dy * dy, Sums<Acc>);
        counts -= (gx != 0) + (gy != 0);
      }
    });
    partials[row] = {add_lanes<double>(sums), add_lanes<int64_t>(counts)};
  }
}

// Finds the residuals of a row of the batch: the derivatives of the total by Ĝ times sobel_denominator.
template <int Radius, typename Acc, typename Source>
static void cpg_residuals(const LossArgs& args, const LossWork<Acc>& work, const Source& source, int64_t row,
                          RowEdgeRuns<Acc>& runs) {
  const Acc count = static_cast<const Acc*>(args.summary)[kEdges];
  const Acc upstream = *static_cast<const Acc*>(args.grad_total);
  const Acc denominator = static_cast<Acc>(sobel_denominator(Radius)) * static_cast<Acc>(sobel_denominator(Radius));
  const Acc scale = count != 0 ? 2 * static_cast<Acc>(args.cpg_weight) * upstream / count / denominator : 0;
  clear_edge_runs(runs);
  for_edge_runs<Acc, Radius>(args, work, source, row, [&](const auto& run, int64_t c) {
    Acc* residuals = add_edge_run(runs, run.x0 - Radius, c);
    for (int64_t k = 0; k < kParts<Acc>; ++k, residuals += kWidth<Acc>) {
      const Vector<Acc> gx = run.gx.parts[k], gy = run.gy.parts[k];
      store_vector(gx != 0 ? scale * (run.px.parts[k] - gx) : Vector<Acc>{}, residuals);
      store_vector(gy != 0 ? scale * (run.py.parts[k] - gy) : Vector<Acc>{}, residuals + kRunWindow);
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

// CPG's part of the gradient of a tile's logits, p (b − s), where b is the derivative of the total by p, which is 0
// except near edges, and s = Σ p b is the pixel's share.
template <typename Acc>
struct SparseGradient {
  const LossArgs& args;
  const LossWork<Acc>& work;
  RowEdgeRuns<Acc>* edge_runs;  // row y of the batch has its place at y % work.edge_rows
  int64_t next_row = 0;         // of the batch: those before it have been found, or are not needed
  Acc shares[kMaxTilePixels];
  Acc* products;     // (C, pitch): p b
  uint8_t* touched;  // (C,): whether a class has any; its products are 0 otherwise

  SparseGradient(const LossArgs& args, const LossWork<Acc>& work, Acc* scratch, RowEdgeRuns<Acc>* edge_runs)
      : args(args), work(work), edge_runs(edge_runs), products(scratch) {
    const int64_t size = args.C * work.pitch;
    touched = reinterpret_cast<uint8_t*>(products + size);
    if (args.cpg_radius == 0) return;
    for (int64_t i = 0; i < size; ++i) products[i] = 0;
    for (int64_t c = 0; c < args.C; ++c) touched[c] = 0;
  }

  // Finds the residuals of all rows whose windows reach the block, once for this block and the next (step
  // cpg_residuals).
  template <typename Source>
  void begin(const Source& source, int64_t block) {
    if (args.cpg_radius == 0) return;
    const int64_t image = block / work.blocks * args.H, index = block % work.blocks;
    const int64_t first = image + clamp(work.row[index] - args.cpg_radius, args.H);
    const int64_t last = image + clamp(work.row[index + 1] - 1 + args.cpg_radius, args.H);
    if (next_row < first) next_row = first;
    for (; next_row <= last; ++next_row)
      with_radius(args, [&](auto radius) {
        cpg_residuals<radius.value>(args, work, source, next_row, edge_runs[next_row % work.edge_rows]);
      });
  }

  // Tells whether a tile may have any products.
  bool reaches(int64_t n, Tile t) const {
    if (args.cpg_radius == 0) return false;
    const int64_t bottom = clamp(t.y + t.rows - 1 + args.cpg_radius, args.H);
    for (int64_t y = clamp(t.y - args.cpg_radius, args.H); y <= bottom; ++y) {
      const RowEdgeRuns<Acc>& row = edge_runs[(n * args.H + y) % work.edge_rows];
      for (int64_t k = 0; k < row.count; ++k)
        if (overlaps(row.runs[k], t)) return true;
    }
    return false;
  }

  // Finds the products of a tile whose probabilities are p, and takes the share from the factor of each pixel (step
  // cpg_shares).
  void find(int64_t n, Tile t, const Acc* p, Acc* factor) {
    for (int64_t i = 0; i < t.count(); ++i) shares[i] = 0;
    with_radius(args, [&](auto radius) {
      for (int64_t k = 0; k < t.rows; ++k) find_row<radius.value>(n, t.y + k, t, k * (t.xb - t.xa), p);
    });
    for (int64_t i = 0; i < t.count(); ++i) factor[i] -= shares[i];
  }

  // Turns p into the gradient, factor * p and the products (step sparse_backward), and forgets these.
  void add_to(const Acc* factor, int64_t count, Acc* p) {
    for (int64_t c = 0; c < args.C; ++c) {
      Acc* __restrict z = p + c * work.pitch;
      for (int64_t i = 0; i < count; ++i) z[i] = factor[i] != 0 ? factor[i] * z[i] : 0;
      if (!touched[c]) continue;
      Acc* __restrict product = products + c * work.pitch;
      for (int64_t i = 0; i < count; ++i) z[i] += product[i], product[i] = 0;
      touched[c] = 0;
    }
  }

 private:
  static bool overlaps(EdgeRun run, Tile t) { return run.x < t.xb && run.x + kRunWindow > t.xa; }

  // Finds the products of label row y, whose pixels begin at `first` in the tile, from all rows whose windows reach it.
  // Borders are replicated, so that a row at the border also stands for those beyond it.
  template <int Radius>
  void find_row(int64_t n, int64_t y, Tile t, int64_t first, const Acc* p) {
    for (int64_t from = clamp(y - Radius, args.H); from <= clamp(y + Radius, args.H); ++from) {
      const RowEdgeRuns<Acc>& row = edge_runs[(n * args.H + from) % work.edge_rows];
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
        const EdgeRun run = row.runs[k];
        if (!overlaps(run, t)) continue;
        Acc b[kRunWindow];
        correlate<Radius>(row.residuals + 2 * kRunWindow * k, taps_x, taps_y, b);
        const int64_t pixel = first + run.x - t.xa;
        touched[run.c] = 1;
        if (run.x >= t.xa && run.x + kRunWindow <= t.xb)
          add(b, run.c, pixel, p);
        else
          add_clamped(b, run, t, first, p);
      }
    }
  }

  // Finds what the residuals of a run give to the columns of its windows. Before the first of them, and behind those
  // for x and those for y, are as many zeros as a window has columns to the left of its last one.
  template <int Radius>
  BCMF_INLINE void correlate(const Acc* residuals, const Acc* taps_x, const Acc* taps_y, Acc* b) {
    for (int64_t i = 0; i < kRunWindow; i += kWidth<Acc>) {
      Vector<Acc> sum = {};
      BCMF_UNROLL
      for (int v = 0; v <= 2 * Radius; ++v)
        sum += taps_x[v] * load_vector(residuals + i - v) + taps_y[v] * load_vector(residuals + kRunWindow + i - v);
      store_vector(sum, b + i);
    }
  }
  void add(const Acc* b, int64_t c, int64_t pixel, const Acc* p) {
    Acc* to = products + c * work.pitch + pixel;
    const Acc* from = p + c * work.pitch + pixel;
    for (int64_t i = 0; i < kRunWindow; i += kWidth<Acc>) {
      const Vector<Acc> derivative = load_vector(b + i);
      const Vector<Acc> product = derivative != 0 ? derivative * load_vector(from + i) : Vector<Acc>{};
      store_vector(load_vector(to + i) + product, to + i);
      store_vector(load_vector(shares + pixel + i) + product, shares + pixel + i);
    }
  }
  // The same where a window reaches out of the tile, or out of the image.
  void add_clamped(const Acc* b, EdgeRun run, Tile t, int64_t first, const Acc* p) {
    for (int64_t i = 0; i < kRunWindow; ++i) {
      const int64_t x = clamp(run.x + i, args.W), pixel = first + x - t.xa, at = run.c * work.pitch + pixel;
      if (x < t.xa || x >= t.xb || b[i] == 0) continue;
      products[at] += b[i] * p[at];
      shares[pixel] += b[i] * p[at];
    }
  }
};
