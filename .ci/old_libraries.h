// .ci/wheel includes this before every file, so that a library made here also loads beside an older glibc and libstdc++.
// Of what these have in two versions a linker takes the newer one, although the kernels need nothing new of it. Whether
// something newer is left, .ci/symbols.py and auditwheel say.
#pragma once

#ifdef __x86_64__  // On other processors the first versions have other names.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
#endif

#include <istream>
#include <new>

// Streams into strings have parts that came with gcc 9 and 11. These are compiled with the kernels. (Locales, which are
// found by their address, must be libstdc++'s: the header above declares them as such.)
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1

namespace std {
__attribute__((weak)) void __throw_bad_array_new_length() { throw bad_alloc(); }  // gcc 11
}

// Since glibc 2.32 libstdc++ asks whether there is but one thread, which could count references without atomics.
extern "C" __attribute__((weak, visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
