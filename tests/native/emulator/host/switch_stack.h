// The only assembly of the emulator: goes on with another stack, without the system call that
// swapcontext makes.
#pragma once

#include <cstdint>
#include <cstring>

/// Saves the registers that a function must keep on this stack, its end in *from, and takes up the
/// stack that ends at `to`.
extern "C" void sparse_attn_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
  .pushsection .text.sparse_attn_switch_stack, "axG", %progbits, sparse_attn_switch_stack, comdat
  .weak sparse_attn_switch_stack
  .type sparse_attn_switch_stack, %function
sparse_attn_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .popsection
)");
#elif defined(__aarch64__)
asm(R"(
  .pushsection .text.sparse_attn_switch_stack, "axG", %progbits, sparse_attn_switch_stack, comdat
  .weak sparse_attn_switch_stack
  .type sparse_attn_switch_stack, %function
sparse_attn_switch_stack:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
  .popsection
)");
#else
#error "the emulator's fibers know x86-64 and aarch64 only; define SPARSE_ATTN_EMULATOR_THREADS"
#endif

namespace sparse_attn::cuda::emulator {

/// The end of a fresh stack, [.., top), on which a switch calls `entry`, which never returns.
inline void* prepare_stack(char* top, void (*entry)()) {
  // As if a switch had saved registers there: all 0 but the return address.
#if defined(__x86_64__)
  constexpr int kWords = 8, kReturn = 6;  // 6 registers, the address, and 8 bytes for alignment
#else
  constexpr int kWords = 20, kReturn = 1;
#endif
  std::uint64_t saved[kWords] = {};
  saved[kReturn] = reinterpret_cast<std::uintptr_t>(entry);
  char* end = top - sizeof(saved);
  std::memcpy(end, saved, sizeof(saved));
  return end;
}

}  // namespace sparse_attn::cuda::emulator
