// The CPU kernels of the context modules' ops. Each isa_<name>.cpp sets the target, defines BCMF_ISA, and includes this
// file. A pixel of a unit is a vector of channels here (units.inl), so that every loop is over vectors.

#include "common/geometry.h"
#include "cpu/entries.h"
#include "cpu/lmfm/lmfm_kernel.h"
#include "cpu/math.h"

namespace bcmf::cpu {
namespace BCMF_ISA {
namespace lmfm {

#include "cpu/lmfm/units.inl"

template <typename Acc>
BCMF_INLINE Vector<Acc> pixel(const Acc* unit, int64_t i) {
  return load_vector(unit + i * kLanes<Acc>);
}
template <typename Acc>
BCMF_INLINE void set_pixel(Acc* unit, int64_t i, Vector<Acc> value) {
  store_vector(value, unit + i * kLanes<Acc>);
}
template <typename Acc>
BCMF_INLINE void add_to_pixel(Acc* unit, int64_t i, Vector<Acc> value) {
  set_pixel(unit, i, pixel(unit, i) + value);
}
template <typename Acc>
BCMF_INLINE void clear(Acc* unit, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) set_pixel(unit, i, Vector<Acc>{});
}

// Returns the sum of f(i) over pixels. It adds up parts of 64 pixels, so that rounding errors grow less with the size
// of a map.
template <typename Acc, typename F>
BCMF_INLINE Vector<Acc> sum_pixels(int64_t count, F f) {
  Vector<Acc> sum = {};
  for (int64_t first = 0; first < count; first += 64) {
    Vector<Acc> part = {};
    for (int64_t i = first; i < count && i < first + 64; ++i) part += f(i);
    sum += part;
  }
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Batch norm and ReLU

template <typename Acc>
BCMF_INLINE Vector<Acc> of_channels(const void* parameter, Channels channels) {
  return load_widened<Acc>(static_cast<const Acc*>(parameter) + channels.first, channels.count);
}

template <typename Acc>
struct Norm {
  Vector<Acc> mean, inverse_std, scale, bias;

  Norm(const Branch& branch, Channels channels, Vector<Acc> mean, Vector<Acc> inverse_std)
      : mean(mean),
        inverse_std(inverse_std),
        scale(inverse_std * of_channels<Acc>(branch.weight, channels)),
        bias(of_channels<Acc>(branch.bias, channels)) {}
  Vector<Acc> centred(Vector<Acc> z) const { return (z - mean) * inverse_std; }
  Vector<Acc> operator()(Vector<Acc> z) const { return (z - mean) * scale + bias; }
};

template <typename Acc>
BCMF_INLINE void move_running(const NormReluArgs& args, void* parameter, Channels channels, Vector<Acc> value) {
  Acc* running = static_cast<Acc*>(parameter) + channels.first;
  const Vector<Acc> old = load_widened<Acc>(running, channels.count);
  store_narrowed<Acc>(old + static_cast<Acc>(args.momentum) * (value - old), running, channels.count);
}

// Makes the norm of z (pixels, lanes). In training it finds the statistics of z and moves the running ones; in eval
// mode it takes these. The first of the tasks that share the channels writes them to stats.
template <typename Acc>
BCMF_INLINE Norm<Acc> find_norm(const NormReluArgs& args, const Branch& branch, Channels channels, const Acc* z,
                                int64_t pixels, bool first) {
  Vector<Acc> mean, variance;
  if (args.training) {
    mean = sum_pixels<Acc>(pixels, [&](int64_t i) { return pixel(z, i); }) / static_cast<Acc>(pixels);
    const Vector<Acc> squares = sum_pixels<Acc>(pixels, [&](int64_t i) {
      const Vector<Acc> difference = pixel(z, i) - mean;
      return difference * difference;
    });
    variance = squares / static_cast<Acc>(pixels);
    move_running<Acc>(args, branch.mean, channels, mean);
    move_running<Acc>(args, branch.variance, channels, squares / static_cast<Acc>(pixels - 1));
  } else {
    mean = of_channels<Acc>(branch.mean, channels);
    variance = of_channels<Acc>(branch.variance, channels);
  }
  Vector<Acc> inverse_std = variance + static_cast<Acc>(args.eps);
  for (int64_t k = 0; k < kLanes<Acc>; ++k) inverse_std[k] = 1 / std::sqrt(inverse_std[k]);
  if (first) {
    Acc* stats = static_cast<Acc*>(args.stats) + branch.first + channels.first;
    store_narrowed<Acc>(mean, stats, channels.count);
    store_narrowed<Acc>(inverse_std, stats + args.channels, channels.count);
  }
  return {branch, channels, mean, inverse_std};
}

// Makes the norm whose statistics the forward has left in stats.
template <typename Acc>
BCMF_INLINE Norm<Acc> read_norm(const NormReluArgs& args, const Branch& branch, Channels channels) {
  const Acc* stats = static_cast<const Acc*>(args.stats) + branch.first;
  return {branch, channels, of_channels<Acc>(stats, channels), of_channels<Acc>(stats + args.channels, channels)};
}

template <typename Acc>
BCMF_INLINE void norm_relu(const Norm<Acc>& norm, Acc* z, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) {
    const Vector<Acc> y = norm(pixel(z, i));
    set_pixel(z, i, y < 0 ? Vector<Acc>{} : y);
  }
}

// Turns the gradient of the output in `grad` into that of z, and writes the gradients of the parameters.
template <typename Acc>
BCMF_INLINE void norm_relu_backward(const NormReluArgs& args, const Branch& branch, Channels channels, const Acc* z,
                                    Acc* grad, int64_t pixels) {
  const Norm<Acc> norm = read_norm<Acc>(args, branch, channels);
  const Vector<Acc> bias = sum_pixels<Acc>(pixels, [&](int64_t i) {
    const Vector<Acc> passed = norm(pixel(z, i)) <= 0 ? Vector<Acc>{} : pixel(grad, i);
    set_pixel(grad, i, passed);
    return passed;
  });
  const Vector<Acc> weight =
      sum_pixels<Acc>(pixels, [&](int64_t i) { return pixel(grad, i) * norm.centred(pixel(z, i)); });
  Acc* grad_norms = static_cast<Acc*>(args.grad_norms) + branch.first + channels.first;
  store_narrowed<Acc>(weight, grad_norms, channels.count);
  store_narrowed<Acc>(bias, grad_norms + args.channels, channels.count);
  const Acc inverse_count = args.training ? 1 / static_cast<Acc>(pixels) : Acc(0);
  for (int64_t i = 0; i < pixels; ++i) {
    const Vector<Acc> common = (bias + norm.centred(pixel(z, i)) * weight) * inverse_count;
    set_pixel(grad, i, norm.scale * (pixel(grad, i) - common));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Pools

// Takes one pool of an image (h, w): row by row of its output along y, to `columns`, then along x.
template <typename Acc>
BCMF_INLINE void pool_image(const Branch& branch, int pool, const Acc* image, Acc* columns, Acc* pooled) {
  const PoolAxis down = pool_axis(pool, branch.h), across = pool_axis(pool, branch.w);
  const Acc inverse_size = 1 / static_cast<Acc>(down.size * across.size);
  for (int64_t y = 0; y < branch.H; ++y) {
    for (int64_t x = 0; x < branch.w; ++x) {
      Vector<Acc> sum = {};
      for (int64_t i = down.first(y); i < down.end(y); ++i) sum += pixel(image, i * branch.w + x);
      set_pixel(columns, x, sum);
    }
    for (int64_t x = 0; x < branch.W; ++x) {
      Vector<Acc> sum = {};
      for (int64_t i = across.first(x); i < across.end(x); ++i) sum += pixel(columns, i);
      set_pixel(pooled, y * branch.W + x, sum * inverse_size);
    }
  }
}

// Adds the gradient of a pool to that of its image.
template <typename Acc>
BCMF_INLINE void pool_backward_image(const Branch& branch, int pool, const Acc* pooled, Acc* columns, Acc* image) {
  const PoolAxis down = pool_axis(pool, branch.h), across = pool_axis(pool, branch.w);
  const Acc inverse_size = 1 / static_cast<Acc>(down.size * across.size);
  for (int64_t y = 0; y < branch.H; ++y) {
    for (int64_t x = 0; x < branch.w; ++x) {
      Vector<Acc> sum = {};
      for (int64_t i = across.first_with(x); i < across.end_with(x); ++i) sum += pixel(pooled, y * branch.W + i);
      set_pixel(columns, x, sum * inverse_size);
    }
    for (int64_t i = down.first(y); i < down.end(y); ++i)
      for (int64_t x = 0; x < branch.w; ++x) add_to_pixel(image, i * branch.w + x, pixel(columns, x));
  }
}

// A task (see lmfm_kernel.h) of pool_norm_relu. find() fills in `pooled`.
template <typename Acc>
struct PoolTask {
  const NormReluArgs& args;
  Channels channels;
  int64_t n, images;
  Acc *pooled[kPools], *grad[kPools];  // (units, images, H, W, lanes)
  Acc *image, *columns;                // (units, h, w, lanes), (w, lanes)

  PoolTask(const NormReluArgs& args, int64_t task, int64_t units, bool backward, Acc* scratch)
      : args(args), images(images_at_once(args, backward)) {
    const int64_t parts = args.N / images;
    n = task % parts * images;
    channels = part_of({0, args.branch[0].C}, task / parts * units * kLanes<Acc>, units * kLanes<Acc>);
    const auto take = [&](int64_t pixels) {
      Acc* part = scratch;
      scratch += pixels * kLanes<Acc>;
      return part;
    };
    for (int p = 0; p < kPools; ++p) pooled[p] = take(units * images * pixels(p));
    for (int p = 0; p < kPools; ++p) grad[p] = backward ? take(units * images * pixels(p)) : nullptr;
    image = take(units * args.branch[0].h * args.branch[0].w);
    columns = take(args.branch[0].w);
  }
  int64_t pixels(int p) const { return args.branch[p].H * args.branch[p].W; }
  int64_t pitch(int p) const { return images * pixels(p) * kLanes<Acc>; }
  int64_t image_pitch() const { return args.branch[0].h * args.branch[0].w * kLanes<Acc>; }
  // Calls f(unit, its channels) for each unit.
  template <typename F>
  void for_units(F f) const {
    for (int64_t c = 0; c < channels.count; c += kLanes<Acc>) f(c / kLanes<Acc>, part_of(channels, c, kLanes<Acc>));
  }

  void find() const {
    const Branch& map = args.branch[0];
    for (int64_t i = 0; i < images; ++i) {
      load_units(map.resampled, n + i, channels, map.h, map.w, image, image_pitch());
      for_units([&](int64_t unit, Channels) {
        for (int p = 0; p < kPools; ++p)
          pool_image(args.branch[p], p, image + unit * image_pitch(), columns,
                     pooled[p] + unit * pitch(p) + i * pixels(p) * kLanes<Acc>);
      });
    }
  }
};

template <typename Acc>
static void pool_forward(const NormReluArgs& args, int64_t units, int64_t begin, int64_t end, Acc* scratch) {
  for (int64_t index = begin; index < end; ++index) {
    const PoolTask<Acc> task(args, index, units, false, scratch);
    task.find();
    for (int p = 0; p < kPools; ++p) {
      const Branch& branch = args.branch[p];
      const int64_t pixels = task.images * task.pixels(p);
      task.for_units([&](int64_t unit, Channels channels) {
        Acc* pooled = task.pooled[p] + unit * task.pitch(p);
        norm_relu(find_norm(args, branch, channels, pooled, pixels, task.n == 0), pooled, pixels);
      });
      for (int64_t i = 0; i < task.images; ++i)
        store_units(branch.out, task.n + i, task.channels, branch.H, branch.W,
                    task.pooled[p] + i * task.pixels(p) * kLanes<Acc>, task.pitch(p));
    }
  }
}

template <typename Acc>
static void pool_backward(const NormReluArgs& args, int64_t units, int64_t begin, int64_t end, Acc* scratch) {
  const Branch& map = args.branch[0];
  for (int64_t index = begin; index < end; ++index) {
    const PoolTask<Acc> task(args, index, units, true, scratch);
    task.find();
    for (int p = 0; p < kPools; ++p) {
      const Branch& branch = args.branch[p];
      for (int64_t n = 0; n < args.N; ++n)
        load_units(branch.out, n, task.channels, branch.H, branch.W, task.grad[p] + n * task.pixels(p) * kLanes<Acc>,
                   task.pitch(p));
      task.for_units([&](int64_t unit, Channels channels) {
        norm_relu_backward(args, branch, channels, task.pooled[p] + unit * task.pitch(p),
                           task.grad[p] + unit * task.pitch(p), args.N * task.pixels(p));
      });
    }
    for (int64_t n = 0; n < args.N; ++n) {
      task.for_units([&](int64_t unit, Channels) {
        Acc* image = task.image + unit * task.image_pitch();
        clear(image, map.h * map.w);
        for (int p = 0; p < kPools; ++p)
          pool_backward_image(args.branch[p], p, task.grad[p] + unit * task.pitch(p) + n * task.pixels(p) * kLanes<Acc>,
                              task.columns, image);
      });
      store_units(map.grad_resampled, n, task.channels, map.h, map.w, task.image, task.image_pitch());
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of a resampled map and another one

template <typename Acc>
BCMF_INLINE Vector<Acc> mix_vectors(Vector<Acc> a, Vector<Acc> b, Acc weight) {
  return weight == 0 ? a : (1 - weight) * a + weight * b;
}

// Resamples the smaller map (h, w) along x, then along y, and adds it to z (H, W).
template <typename Acc>
static void add_resampled(const Branch& branch, const Acc* small, Acc* rows, Acc* z) {
  for (int64_t x = 0; x < branch.W; ++x) {
    const AxisTap<Acc> tap = axis_tap<Acc>(x, branch.w, branch.W, false);
    for (int64_t y = 0; y < branch.h; ++y) {
      const int64_t row = y * branch.w;
      set_pixel(rows, y * branch.W + x,
                mix_vectors<Acc>(pixel(small, row + tap.first), pixel(small, row + tap.second), tap.weight));
    }
  }
  for (int64_t y = 0; y < branch.H; ++y) {
    const AxisTap<Acc> tap = axis_tap<Acc>(y, branch.h, branch.H, false);
    for (int64_t x = 0; x < branch.W; ++x)
      add_to_pixel(
          z, y * branch.W + x,
          mix_vectors<Acc>(pixel(rows, tap.first * branch.W + x), pixel(rows, tap.second * branch.W + x), tap.weight));
  }
}

// Finds the gradient of the smaller map.
template <typename Acc>
static void resampled_backward(const Branch& branch, const Acc* grad, Acc* rows, Acc* small) {
  clear(rows, branch.h * branch.W);
  for (int64_t y = 0; y < branch.H; ++y) {
    const AxisTap<Acc> tap = axis_tap<Acc>(y, branch.h, branch.H, false);
    for (int64_t x = 0; x < branch.W; ++x) {
      const Vector<Acc> value = pixel(grad, y * branch.W + x);
      add_to_pixel<Acc>(rows, tap.first * branch.W + x, value * (1 - tap.weight));
      if (tap.weight != 0) add_to_pixel<Acc>(rows, tap.second * branch.W + x, value * tap.weight);
    }
  }
  clear(small, branch.h * branch.w);
  for (int64_t x = 0; x < branch.W; ++x) {
    const AxisTap<Acc> tap = axis_tap<Acc>(x, branch.w, branch.W, false);
    for (int64_t y = 0; y < branch.h; ++y) {
      const Vector<Acc> value = pixel(rows, y * branch.W + x);
      add_to_pixel<Acc>(small, y * branch.w + tap.first, value * (1 - tap.weight));
      if (tap.weight != 0) add_to_pixel<Acc>(small, y * branch.w + tap.second, value * tap.weight);
    }
  }
}

// A task (see lmfm_kernel.h) of add_norm_relu: units of one branch. find() fills in the sums z.
template <typename Acc>
struct AddTask {
  const Branch* branch;
  Channels channels;
  int64_t n, images;
  Acc *z, *grad;      // (units, images, H, W, lanes)
  Acc *small, *rows;  // (units, h, w, lanes), (h, W, lanes)

  AddTask(const NormReluArgs& args, int64_t task, int64_t units, bool backward, Acc* scratch)
      : images(images_at_once(args, backward)), z(scratch) {
    const int64_t parts = args.N / images, lanes = units * kLanes<Acc>;
    n = task % parts * images;
    int64_t group = task / parts;
    for (branch = args.branch; group >= (branch->C + lanes - 1) / lanes; ++branch)
      group -= (branch->C + lanes - 1) / lanes;
    channels = part_of({0, branch->C}, group * lanes, lanes);
    grad = z + units * pitch();
    small = backward ? grad + units * pitch() : grad;
    rows = small + units * small_pitch();
  }
  int64_t pixels() const { return branch->H * branch->W; }
  int64_t pitch() const { return images * pixels() * kLanes<Acc>; }
  int64_t small_pitch() const { return branch->h * branch->w * kLanes<Acc>; }
  // Calls f(unit, its channels) for each unit.
  template <typename F>
  void for_units(F f) const {
    for (int64_t c = 0; c < channels.count; c += kLanes<Acc>) f(c / kLanes<Acc>, part_of(channels, c, kLanes<Acc>));
  }

  void find() const {
    for (int64_t i = 0; i < images; ++i) {
      Acc* image = z + i * pixels() * kLanes<Acc>;
      if (branch->added.data) load_units(branch->added, n + i, channels, branch->H, branch->W, image, pitch());
      if (branch->resampled.data)
        load_units(branch->resampled, n + i, channels, branch->h, branch->w, small, small_pitch());
      for_units([&](int64_t unit, Channels) {
        if (!branch->added.data) clear(image + unit * pitch(), pixels());
        if (branch->resampled.data) add_resampled(*branch, small + unit * small_pitch(), rows, image + unit * pitch());
      });
    }
  }
};

template <typename Acc>
static void add_forward(const NormReluArgs& args, int64_t units, int64_t begin, int64_t end, Acc* scratch) {
  for (int64_t index = begin; index < end; ++index) {
    const AddTask<Acc> task(args, index, units, false, scratch);
    const Branch& branch = *task.branch;
    task.find();
    task.for_units([&](int64_t unit, Channels channels) {
      Acc* z = task.z + unit * task.pitch();
      const int64_t pixels = task.images * task.pixels();
      norm_relu(find_norm(args, branch, channels, z, pixels, task.n == 0), z, pixels);
    });
    for (int64_t i = 0; i < task.images; ++i)
      store_units(branch.out, task.n + i, task.channels, branch.H, branch.W, task.z + i * task.pixels() * kLanes<Acc>,
                  task.pitch());
  }
}

template <typename Acc>
static void add_backward(const NormReluArgs& args, int64_t units, int64_t begin, int64_t end, Acc* scratch) {
  for (int64_t index = begin; index < end; ++index) {
    const AddTask<Acc> task(args, index, units, true, scratch);
    const Branch& branch = *task.branch;
    task.find();
    const auto grad_of = [&](int64_t n) { return task.grad + n * task.pixels() * kLanes<Acc>; };
    for (int64_t n = 0; n < args.N; ++n)
      load_units(branch.out, n, task.channels, branch.H, branch.W, grad_of(n), task.pitch());
    task.for_units([&](int64_t unit, Channels channels) {
      norm_relu_backward(args, branch, channels, task.z + unit * task.pitch(), task.grad + unit * task.pitch(),
                         args.N * task.pixels());
    });
    for (int64_t n = 0; n < args.N; ++n) {
      if (branch.added.data)
        store_units(branch.grad_added, n, task.channels, branch.H, branch.W, grad_of(n), task.pitch());
      if (!branch.resampled.data) continue;
      task.for_units([&](int64_t unit, Channels) {
        resampled_backward(branch, grad_of(n) + unit * task.pitch(), task.rows, task.small + unit * task.small_pitch());
      });
      store_units(branch.grad_resampled, n, task.channels, branch.h, branch.w, task.small, task.small_pitch());
    }
  }
}

template <typename Acc>
constexpr LmfmKernels<Acc> kernels = {kLanes<Acc>, pool_forward<Acc>, pool_backward<Acc>, add_forward<Acc>,
                                      add_backward<Acc>};

}  // namespace lmfm
}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
