// Sources read the logits of a tile, and write its gradients: from and to a tensor of any strides and dtype, directly
// or resampled bilinearly. loss_kernel.inl includes this file.

// Calls f(y, x, i, length) for the row segments of a tile; i is the number of the segment's first pixel in the tile.
// Rows that follow each other in memory without a gap count as one.
template <typename F>
BCMF_INLINE void for_segments(const LossArgs& args, const MapView& view, Tile t, F f) {
  if (t.xb - t.xa == args.W && view.stride_h == args.W * view.stride_w) return f(t.y, t.xa, int64_t{0}, t.count());
  for (int64_t k = 0; k < t.rows; ++k) f(t.y + k, t.xa, k * (t.xb - t.xa), t.xb - t.xa);
}

// Reads `length` logits of one class, which are `stride` apart, as acc.
template <typename Acc>
static void widen_row(const MapView& v, int64_t offset, int64_t stride, int64_t length, Acc* __restrict to) {
  with_entries<Acc>(v, offset, [&](const auto* from) {
    if (stride == 1)
      for (int64_t k = 0; k < length; ++k) to[k] = widen(from[k]);
    else
      for (int64_t k = 0; k < length; ++k) to[k] = widen(from[k * stride]);
  });
}

template <typename Acc>
static Acc read_logit(const MapView& v, int64_t offset) {
  return with_entries<Acc>(v, offset, [](const auto* from) -> Acc { return widen(*from); });
}

// Reads the logits of a tile to z, (C, pitch) acc, where pixels are contiguous whatever the strides of the tensor are.
template <typename Scalar, typename Acc>
static void load_as(const LossArgs& args, int64_t n, Tile t, Acc* __restrict z, int64_t pitch) {
  const MapView& v = args.logits;
  const Scalar* image = static_cast<const Scalar*>(v.data) + n * v.stride_n;
  for_segments(args, v, t, [&](int64_t y, int64_t x, int64_t i, int64_t length) {
    const Scalar* from = image + y * v.stride_h + x * v.stride_w;
    if (v.stride_w == 1) {
      for (int64_t c = 0; c < args.C; ++c)
        for (int64_t k = 0; k < length; ++k) z[c * pitch + i + k] = widen(from[c * v.stride_c + k]);
    } else {
      for (int64_t k = 0; k < length; ++k)
        for (int64_t c = 0; c < args.C; ++c) z[c * pitch + i + k] = widen(from[k * v.stride_w + c * v.stride_c]);
    }
  });
}

// Writes a row to contiguous memory; with `stream` past the cache, which saves reading what was there.
template <typename Scalar, typename Acc>
BCMF_INLINE void narrow_row(const Acc* __restrict from, int64_t length, bool stream, Scalar* __restrict to) {
  int64_t k = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(Scalar) == sizeof(float)) {
    if (stream) {
      for (; k < length && reinterpret_cast<uintptr_t>(to + k) % 16 != 0; ++k) to[k] = from[k];
      for (; k + 4 <= length; k += 4) _mm_stream_ps(to + k, _mm_loadu_ps(from + k));
    }
  }
#endif
  for (; k < length; ++k) narrow(from[k], to + k);
}
BCMF_INLINE void finish_streams() {  // has to be called before other threads read
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename Scalar, typename Acc>
static void store_as(const LossArgs& args, const LossWork<Acc>& work, int64_t n, Tile t, const Acc* __restrict z) {
  const MapView& v = args.grad;
  Scalar* image = static_cast<Scalar*>(v.data) + n * v.stride_n;
  for_segments(args, v, t, [&](int64_t y, int64_t x, int64_t i, int64_t length) {
    Scalar* to = image + y * v.stride_h + x * v.stride_w;
    if (v.stride_w == 1) {
      for (int64_t c = 0; c < args.C; ++c) narrow_row(z + c * work.pitch + i, length, work.stream, to + c * v.stride_c);
    } else {
      for (int64_t k = 0; k < length; ++k)
        for (int64_t c = 0; c < args.C; ++c) narrow(z[c * work.pitch + i + k], to + k * v.stride_w + c * v.stride_c);
    }
  });
}

// kRunWindow columns of a row.
template <typename T>
constexpr int64_t kParts = kRunWindow / kWidth<T>;
template <typename T>
struct Columns {
  Vector<T> parts[kParts<T>];
};

template <typename T>
BCMF_INLINE Columns<T> load_columns(const T* from) {
  Columns<T> to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
// Reads them from column x on, with replicated borders.
template <typename T, typename From>
BCMF_INLINE Columns<T> read_columns(const From* row, int64_t x, int64_t width) {
  T to[kRunWindow];
  if (x >= 0 && x + kRunWindow <= width) {
    BCMF_LANES
    for (int64_t i = 0; i < kRunWindow; ++i) to[i] = row[x + i];
  } else {
    for (int64_t i = 0; i < kRunWindow; ++i) to[i] = row[clamp(x + i, width)];
  }
  return load_columns(to);
}
// Returns the columns from `By` on. Those beyond the last may be anything.
template <int By, typename T>
BCMF_INLINE Columns<T> shifted(const Columns<T>& from) {
  constexpr int64_t kLast = kParts<T> - 1, kSkip = By / kWidth<T>;
  Columns<T> to;
  for (int64_t k = 0; k <= kLast; ++k) {
    const int64_t low = k + kSkip < kLast ? k + kSkip : kLast, high = low < kLast ? low + 1 : kLast;
    to.parts[k] = shift_lanes<By % kWidth<T>, T>(from.parts[low], from.parts[high]);
  }
  return to;
}

// Prefetches the logits of the next tile one by one while a tile is worked on, because rows of a tile are too short for
// the processor to foresee them.
struct LogitsAhead {
  const char* data;
  int64_t class_bytes, pixel_bytes;
  void fetch(int64_t c, int64_t i) const { __builtin_prefetch(data + c * class_bytes + i * pixel_bytes, 0, 2); }
};
struct NothingAhead {
  void fetch(int64_t, int64_t) const {}
};

// Reads logits of the labels' size.
template <typename Acc>
struct Direct {
  // The logits at kRunWindow columns of the `Size` rows around one, with replicated borders.
  template <int Size>
  struct Window {
    const Direct& source;
    int64_t rows[Size], columns[kRunWindow];  // offsets
    bool contiguous;

    void begin(int64_t n, int64_t y, int64_t x) {
      const LossArgs& args = source.args;
      const MapView& v = args.logits;
      for (int u = 0; u < Size; ++u) rows[u] = n * v.stride_n + clamp(y + u - Size / 2, args.H) * v.stride_h;
      for (int64_t i = 0; i < kRunWindow; ++i) columns[i] = clamp(x + i, args.W) * v.stride_w;
      contiguous = v.stride_w == 1 && x >= 0 && x + kRunWindow <= args.W;
    }
    // Reads those of a class.
    void read(int64_t c, Columns<Acc> (&to)[Size]) const {
      with_entries<Acc>(source.args.logits, c * source.args.logits.stride_c, [&](const auto* map) {
        const auto* next = map + rows[Size - 1] + source.args.logits.stride_h;  // the windows below will want it
        __builtin_prefetch(next + columns[0], 0, 2);
        __builtin_prefetch(next + columns[kRunWindow - 1], 0, 2);
        for (int u = 0; u < Size; ++u) {
          const auto* row = map + rows[u];
          Acc values[kRunWindow];
          if (contiguous) {
            const auto* from = row + columns[0];
            BCMF_LANES
            for (int64_t i = 0; i < kRunWindow; ++i) values[i] = widen(from[i]);
          } else {
            for (int64_t i = 0; i < kRunWindow; ++i) values[i] = widen(row[columns[i]]);
          }
          to[u] = load_columns(values);
        }
      });
    }
  };

  const LossArgs& args;
  const LossWork<Acc>& work;

  Direct(const LossArgs& args, const LossWork<Acc>& work, Acc* = nullptr) : args(args), work(work) {}

  void begin(int64_t, Tile) {}
  void clear_sums() {}
  LogitsAhead ahead(int64_t n, Tile t) const {
    const MapView& v = args.logits;
    const int64_t size = v.type == FloatType::f64 ? 8 : v.type == FloatType::f32 ? 4 : 2;
    const int64_t y = t.xb < args.W ? t.y : t.y + t.rows, x = t.xb < args.W ? t.xb : 0;
    const int64_t next = n * v.stride_n + y * v.stride_h + x * v.stride_w;
    return {static_cast<const char*>(v.data) + next * size, v.stride_c * size, v.stride_w * size};
  }
  void load(int64_t n, Tile t, Acc* z) const {
    if constexpr (sizeof(Acc) == sizeof(double)) return load_as<double>(args, n, t, z, work.pitch);
    if constexpr (sizeof(Acc) == sizeof(float)) {
      if (args.logits.type == FloatType::f16) return load_as<F16>(args, n, t, z, work.pitch);
      if (args.logits.type == FloatType::bf16) return load_as<BF16>(args, n, t, z, work.pitch);
      load_as<float>(args, n, t, z, work.pitch);
    }
  }
  Acc entry(int64_t n, int64_t y, int64_t x, int64_t c) const {
    const MapView& v = args.logits;
    return read_logit<Acc>(v, n * v.stride_n + c * v.stride_c + y * v.stride_h + x * v.stride_w);
  }
  void add_gradient(int64_t n, Tile t, const Acc* z) {
    if constexpr (sizeof(Acc) == sizeof(double)) return store_as<double>(args, work, n, t, z);
    if constexpr (sizeof(Acc) == sizeof(float)) {
      if (args.grad.type == FloatType::f16) return store_as<F16>(args, work, n, t, z);
      if (args.grad.type == FloatType::bf16) return store_as<BF16>(args, work, n, t, z);
      store_as<float>(args, work, n, t, z);
    }
  }
  void end(int64_t, Tile) {}
};

// Reads logits of another size. All label rows of a block lie between the same two logit rows, which are resampled
// along x once: a label row then takes two products per pixel and class. The gradients of a block's rows are summed up
// into two rows, too, and brought back along x once.
template <typename Acc>
struct Resampled {
  // The logits at kRunWindow columns of the `Size` rows around one, with replicated borders. They are resampled along x
  // first, as in `load`: in another order, p of large logits would differ from the forward's by much. A logit row that
  // several of the rows lie beside is resampled once.
  template <int Size>
  struct Window {
    const Resampled& source;
    int64_t logit_rows[2 * Size], count;  // offsets of the logit rows
    int above[Size], below[Size];         // which of them each row lies between
    Acc weight_below[Size];
    Columns<Lane<Acc>> left, right;  // logit columns
    Columns<Acc> weight_right;
    int64_t first;       // left and right begin here
    bool in_one_vector;  // the logit columns from `first` on

    void begin(int64_t n, int64_t y, int64_t x) {
      const LossArgs& args = source.args;
      const MapView& v = args.logits;
      const auto &vertical = source.work.vertical, &horizontal = source.work.horizontal;
      count = 0;
      for (int u = 0; u < Size; ++u) {
        const int64_t row = clamp(y + u - Size / 2, args.H);
        above[u] = place_of(n * v.stride_n + vertical.first[row] * v.stride_h);
        below[u] = place_of(n * v.stride_n + vertical.second[row] * v.stride_h);
        weight_below[u] = vertical.weight[row];
      }
      left = read_columns<Lane<Acc>>(horizontal.first, x, args.W);
      right = read_columns<Lane<Acc>>(horizontal.second, x, args.W);
      weight_right = read_columns<Acc>(horizontal.weight, x, args.W);
      const int64_t last = horizontal.second[clamp(x + kRunWindow - 1, args.W)];
      first = horizontal.first[clamp(x, args.W)];
      if (first + kWidth<Acc> > args.w) first = args.w < kWidth<Acc> ? 0 : args.w - kWidth<Acc>;
      in_one_vector = v.stride_w == 1 && kWidth<Acc> <= args.w && last < first + kWidth<Acc>;
      for (auto& part : left.parts) part -= static_cast<Lane<Acc>>(first);
      for (auto& part : right.parts) part -= static_cast<Lane<Acc>>(first);
    }
    // Reads those of a class.
    void read(int64_t c, Columns<Acc> (&to)[Size]) const {
      const MapView& v = source.args.logits;
      Columns<Acc> along[2 * Size];
      with_entries<Acc>(v, c * v.stride_c + first * v.stride_w, [&](const auto* map) {
        for (int64_t k = 0; k < count; ++k) along[k] = resample(map + logit_rows[k]);
      });
      for (int u = 0; u < Size; ++u)
        for (int64_t k = 0; k < kParts<Acc>; ++k)
          to[u].parts[k] = mix_lanes(along[above[u]].parts[k], along[below[u]].parts[k], splat(weight_below[u]));
    }

   private:
    static Vector<Acc> mix_lanes(Vector<Acc> a, Vector<Acc> b, Vector<Acc> weight) {  // as `mix`
      return weight == 0 ? a : (1 - weight) * a + weight * b;
    }
    template <typename Scalar>
    Columns<Acc> resample(const Scalar* row) const {
      Columns<Acc> a, b;
      if (in_one_vector) {
        Acc values[kWidth<Acc>];
        BCMF_LANES
        for (int64_t i = 0; i < kWidth<Acc>; ++i) values[i] = widen(row[i]);
        const Vector<Acc> all = load_vector(values);
        for (int64_t k = 0; k < kParts<Acc>; ++k) {
          a.parts[k] = permute<Acc>(all, left.parts[k]);
          b.parts[k] = permute<Acc>(all, right.parts[k]);
        }
      } else {
        a = gather(row, left), b = gather(row, right);
      }
      for (int64_t k = 0; k < kParts<Acc>; ++k) a.parts[k] = mix_lanes(a.parts[k], b.parts[k], weight_right.parts[k]);
      return a;
    }
    template <typename Scalar>
    Columns<Acc> gather(const Scalar* row, const Columns<Lane<Acc>>& places) const {
      Lane<Acc> at[kRunWindow];
      Acc values[kRunWindow];
      std::memcpy(at, &places, sizeof(at));
      for (int64_t i = 0; i < kRunWindow; ++i) values[i] = widen(row[at[i] * source.args.logits.stride_w]);
      return load_columns(values);
    }
    int place_of(int64_t logit_row) {
      for (int64_t k = count; k-- > 0;)
        if (logit_rows[k] == logit_row) return static_cast<int>(k);
      logit_rows[count] = logit_row;
      return static_cast<int>(count++);
    }
  };

  const LossArgs& args;
  const LossWork<Acc>& work;
  Acc *upper = nullptr, *lower = nullptr;   // (C, pitch): logits of the two rows, resampled along x
  int64_t lower_row = -1, column = -1;      // the row of the batch, and its first label column, that `lower` holds
  Acc *sum = nullptr, *weighted = nullptr;  // (C, pitch), backward: sums of gradients, and of those times the weight of
                                            // the lower row

  // scratch: four tiles, or null where only entries are read.
  Resampled(const LossArgs& args, const LossWork<Acc>& work, Acc* scratch = nullptr) : args(args), work(work) {
    if (!scratch) return;
    const int64_t tile_size = args.C * work.pitch;
    upper = scratch;
    lower = scratch + tile_size;
    sum = scratch + 2 * tile_size;
    weighted = scratch + 3 * tile_size;
  }

  // Begins a strip of columns of a block, of which t is the first tile. Its upper row is mostly the lower row of the
  // block before.
  void begin(int64_t n, Tile t) {
    const int64_t above = n * args.h + work.vertical.first[t.y], below = n * args.h + work.vertical.second[t.y];
    if (above == lower_row && t.xa == column) {
      Acc* const there = upper;
      upper = lower, lower = there;
    } else {
      resample_rows(above, t, upper);
    }
    resample_rows(below, t, lower);
    lower_row = below, column = t.xa;
  }
  NothingAhead ahead(int64_t, Tile) const { return {}; }
  void clear_sums() {
    for (int64_t i = 0; i < args.C * work.pitch; ++i) sum[i] = weighted[i] = 0;
  }
  void load(int64_t, Tile t, Acc* z) const {
    const Acc weight = work.vertical.weight[t.y];
    for (int64_t c = 0; c < args.C; ++c) {
      const Acc* __restrict a = upper + c * work.pitch, * __restrict b = lower + c * work.pitch;
      Acc* __restrict to = z + c * work.pitch;
      for (int64_t i = 0; i < t.count(); ++i) to[i] = mix(a[i], b[i], weight);
    }
  }
  // Resamples a single logit, along x first, as in `load`.
  Acc entry(int64_t n, int64_t y, int64_t x, int64_t c) const {
    const MapView& v = args.logits;
    const auto along_x = [&](int64_t row) {
      const int64_t offset = n * v.stride_n + c * v.stride_c + row * v.stride_h;
      return mix(read_logit<Acc>(v, offset + work.horizontal.first[x] * v.stride_w),
                 read_logit<Acc>(v, offset + work.horizontal.second[x] * v.stride_w), work.horizontal.weight[x]);
    };
    return mix(along_x(work.vertical.first[y]), along_x(work.vertical.second[y]), work.vertical.weight[y]);
  }
  void add_gradient(int64_t, Tile t, const Acc* z) {
    const Acc weight = work.vertical.weight[t.y];
    for (int64_t c = 0; c < args.C; ++c) {
      const Acc* __restrict from = z + c * work.pitch;
      Acc* __restrict s = sum + c * work.pitch, * __restrict w = weighted + c * work.pitch;
      for (int64_t i = 0; i < t.count(); ++i) {
        s[i] += from[i];
        w[i] += weight * from[i];
      }
    }
  }
  // Ends the strip: brings its sums back to the logits' columns. `block` is numbered over the batch.
  void end(int64_t block, Tile t) {
    Acc* halves = work.halves + (block - work.first_block) * 2 * args.C * args.w;
    for (int64_t i = 0; i < 2 * args.C * args.w && t.xa == 0; ++i) halves[i] = 0;
    for (int64_t c = 0; c < args.C; ++c) {
      Acc *above = halves + c * args.w, *below = halves + (args.C + c) * args.w;
      const Acc *s = sum + c * work.pitch, *w = weighted + c * work.pitch;
      for (int64_t x = t.xa; x < t.xb;) {  // each time over the pixels between the same two columns of logits
        const int64_t left = work.horizontal.first[x], right = work.horizontal.second[x];
        Acc al = 0, ar = 0, bl = 0, br = 0;
        for (; x < t.xb && work.horizontal.first[x] == left; ++x) {
          const Acc weight = work.horizontal.weight[x];
          const Acc b = w[x - t.xa], a = s[x - t.xa] - b;
          al += (1 - weight) * a, ar += weight * a, bl += (1 - weight) * b, br += weight * b;
        }
        above[left] += al, above[right] += ar, below[left] += bl, below[right] += br;
      }
    }
  }

 private:
  void resample_rows(int64_t row, Tile t, Acc* to) const {
    for (int64_t c = 0; c < args.C; ++c) resample_row(row / args.h, row % args.h, t, c, to + c * work.pitch);
  }
  void resample_row(int64_t n, int64_t row, Tile t, int64_t c, Acc* __restrict to) const {
    const MapView& v = args.logits;
    const int64_t offset = n * v.stride_n + c * v.stride_c + row * v.stride_h;
    const int64_t first = work.horizontal.first[t.xa], last = work.horizontal.second[t.xb - 1];
    const int32_t *left = work.horizontal.first + t.xa, *right = work.horizontal.second + t.xa;
    const Acc* weight = work.horizontal.weight + t.xa;
    if (last - first < kMaxTilePixels) {
      Acc cells[kMaxTilePixels];
      widen_row(v, offset + first * v.stride_w, v.stride_w, last - first + 1, cells);
      const Acc* base = cells - first;
      for (int64_t i = 0; i < t.count(); ++i) to[i] = mix(base[left[i]], base[right[i]], weight[i]);
    } else {  // there are many more logits than labels
      for (int64_t i = 0; i < t.count(); ++i)
        to[i] = mix(read_logit<Acc>(v, offset + left[i] * v.stride_w),
                    read_logit<Acc>(v, offset + right[i] * v.stride_w), weight[i]);
    }
  }
};

// Finds the gradients of the logit rows begin..end of the batch: the sum of what the blocks above and below each row
// have added to it. (A block beyond the last row's centre lies between that row and itself.)
template <typename Acc>
static void low_gather(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
  const MapView& v = args.grad;
  Acc row[kMaxTilePixels];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / args.h, y = index % args.h;
    const int64_t from = work.block[y > 0 ? y - 1 : 0], to = work.block[y + 1];
    for (int64_t c = 0; c < args.C; ++c)
      for (int64_t x = 0; x < args.w; x += kMaxTilePixels) {
        const int64_t length = args.w - x < kMaxTilePixels ? args.w - x : kMaxTilePixels;
        for (int64_t i = 0; i < length; ++i) row[i] = 0;
        for (int64_t block = from; block < to; ++block) {
          const int64_t label_row = work.row[block];
          const Acc* halves = work.halves + (n * work.blocks + block - work.first_block) * 2 * args.C * args.w;
          const Acc *above = halves + c * args.w + x, *below = halves + (args.C + c) * args.w + x;
          if (work.vertical.first[label_row] == y)
            for (int64_t i = 0; i < length; ++i) row[i] += above[i];
          if (work.vertical.second[label_row] == y)
            for (int64_t i = 0; i < length; ++i) row[i] += below[i];
        }
        const int64_t offset = n * v.stride_n + c * v.stride_c + y * v.stride_h + x * v.stride_w;
        const auto store = [&](auto* grad) {
          for (int64_t i = 0; i < length; ++i) narrow(row[i], grad + offset + i * v.stride_w);
        };
        if (v.type == FloatType::f64) {
          if constexpr (sizeof(Acc) == sizeof(double)) store(static_cast<double*>(v.data));
        } else if constexpr (sizeof(Acc) == sizeof(float)) {
          if (v.type == FloatType::f16) store(static_cast<F16*>(v.data));
          if (v.type == FloatType::bf16) store(static_cast<BF16*>(v.data));
          if (v.type == FloatType::f32) store(static_cast<float*>(v.data));
        }
      }
  }
}
