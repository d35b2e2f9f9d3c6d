/* Makes a program believe that this x86-64 CPU ends at AVX2: no AVX-512, VNNI, AVX-VNNI or AMX.
 *
 *   cc -O2 -shared -fPIC -o hide_vnni.so hide_vnni.c && LD_PRELOAD=./hide_vnni.so program
 *
 * Linux can let the instruction CPUID fault (arch_prctl(2), ARCH_SET_CPUID; the CPU needs
 * `cpuid_fault` in /proc/cpuinfo). The handler answers with the bits below taken out. Whatever asks
 * the CPU afterwards, as ONNX Runtime and oneDNN do, then takes its AVX2 code, on the real silicon
 * and at its own speed. New threads inherit the setting; exec(2) ends it. Where faulting is not to
 * be had the program does not start: exit code 77.
 *
 * Bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(number) (1u << (number))

enum {
  EXTENDED_FEATURES = 0x07,
  EXTENDED_STATE = 0x0d,
  AMX_TILES = 0x1d,
  AMX_TMUL = 0x1e,
  AVX10 = 0x24
};

/* Raw, because a failing system call must not touch the errno of the program. */
static long set_cpuid(long enabled) {
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"((long)SYS_arch_prctl), "D"((long)ARCH_SET_CPUID), "S"(enabled)
                   : "rcx", "r11", "memory");
  return result;
}

static void answer_cpuid(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const unsigned char *)registers[REG_RIP];
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
    signal(number, SIG_DFL); /* a fault of the program's own: it happens again, and ends it */
    return;
  }
  unsigned leaf = (unsigned)registers[REG_RAX], part = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  set_cpuid(1);
  __cpuid_count(leaf, part, a, b, c, d);
  set_cpuid(0);
  if (leaf == EXTENDED_FEATURES && part == 0) {
    /* AVX512F, DQ, IFMA, PF, ER, CD, BW, VL */
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    /* AVX512_VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512_VNNI, BITALG, VPOPCNTDQ */
    c &= ~(BIT(1) | BIT(6) | BIT(8) | BIT(9) | BIT(10) | BIT(11) | BIT(12) | BIT(14));
    /* AVX512_4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX512_FP16, AMX-TILE, AMX-INT8 */
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
  } else if (leaf == EXTENDED_FEATURES || leaf == AMX_TILES || leaf == AMX_TMUL || leaf == AVX10) {
    a = b = c = d = 0; /* the further parts of 7 have AVX-VNNI, AVX512_BF16 and what came later */
  } else if (leaf == EXTENDED_STATE && part == 0) {
    a &= BIT(0) | BIT(1) | BIT(2); /* x87, SSE and AVX registers */
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action = {.sa_sigaction = answer_cpuid, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &action, NULL);
  if (set_cpuid(0) != 0) {
    fputs("This kernel or CPU cannot let CPUID fault.\n", stderr);
    _exit(77);
  }
}
