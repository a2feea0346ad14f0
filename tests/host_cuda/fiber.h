// Switching between stacks: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_cuda {

// Memory for one fiber, with a page below it that may not be touched. Stacks are kept and used again.
class Stack {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  static char* take() {
    if (!unused().empty()) {
      char* stack = unused().back();
      unused().pop_back();
      return stack;
    }
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    mprotect(memory, 4096, PROT_NONE);
    return static_cast<char*>(memory);
  }
  static void give_back(char* stack) { unused().push_back(stack); }

 private:
  static std::vector<char*>& unused() {
    static std::vector<char*> stacks;
    return stacks;
  }
};

#if defined(__x86_64__)

using Context = void*;

#if defined(__clang__)
#define HOST_CUDA_OPAQUE naked, noinline
#else
#define HOST_CUDA_OPAQUE naked, noipa
#endif

// Pushes what the caller expects to be kept, leaves the stack pointer in *from and goes on from `to`.
__attribute__((HOST_CUDA_OPAQUE)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
      "ret\n");
}

inline void make_context(Context* context, char* stack, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + Stack::kBytes);
  // The entry is returned to, not called: a slot for the return address it lacks keeps the stack aligned.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  *context = top;
}

#else

using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = Stack::kBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#endif

}  // namespace host_cuda
