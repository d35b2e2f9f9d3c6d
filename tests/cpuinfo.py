"""/proc/cpuinfo as Linux prints it for several CPUs, without the fields that nobody reads."""

from __future__ import annotations

XEON_ICE_LAKE = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
flags\t\t: fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx \
fxsr sse sse2 ss ht syscall nx pdpe1gb rdtscp lm constant_tsc pni pclmulqdq ssse3 fma cx16 pcid \
sse4_1 sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand hypervisor lahf_lm abm bmi1 avx2 smep \
bmi2 erms avx512f avx512dq rdseed adx avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl \
avx512vbmi avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg avx512_vpopcntdq
vmx flags\t: vnmi preemption_timer posted_intr invvpid ept_x_only ept_ad ept_1gb flexpriority
bugs\t\t: spectre_v1 spectre_v2 spec_store_bypass swapgs mmio_stale_data

processor\t: 1
flags\t\t: of another core
"""
ALDER_LAKE_N = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) N100
flags\t\t: fpu vme de pse tsc msr sse sse2 ss ht ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes avx \
f16c rdrand abm bmi1 avx2 smep bmi2 erms invpcid rdseed adx sha_ni avx_vnni umip gfni vaes
"""
HASWELL = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i5-4590 CPU @ 3.30GHz
flags\t\t: fpu vme de pse tsc msr pae sse sse2 ss ht tm pbe syscall nx pni pclmulqdq ssse3 sdbg \
fma cx16 xtpr pdcm pcid sse4_1 sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand lahf_lm abm \
bmi1 avx2 smep bmi2 erms invpcid xsaveopt
"""
ZEN_2 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD Ryzen 7 3700X 8-Core Processor
flags\t\t: fpu vme de pse tsc msr pae sse sse2 ht syscall nx mmxext fxsr_opt pdpe1gb rdtscp lm pni \
pclmulqdq monitor ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand lahf_lm \
sse4a misalignsse 3dnowprefetch bmi1 avx2 smep bmi2 rdseed adx clflushopt clwb sha_ni
"""
SKYLAKE_X = """\
processor\t: 0
model name\t: Intel(R) Core(TM) i9-7900X CPU @ 3.30GHz
flags\t\t: fpu sse sse2 ssse3 fma sse4_1 sse4_2 avx f16c avx2 avx512f avx512dq avx512cd avx512bw \
avx512vl
"""
CORE_2 = """\
processor\t: 0
model name\t: Intel(R) Core(TM)2 Duo CPU     E8400  @ 3.00GHz
flags\t\t: fpu vme de pse tsc msr sse sse2 ss ht ssse3 cx16 sse4_1 lahf_lm
"""
CORTEX_A76 = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc \
dcpop asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b

processor\t: 1
Features\t: of another core

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
