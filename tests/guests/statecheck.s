# A Linux program that notices when a processor, a timer or a clock has lost anything.
#
# Two threads, each on a processor of its own, go through rounds for ever. In a round each keeps
# known values in the general, x87 and SSE registers while it computes a checksum that must always
# be the same; compares clocks with the highest value that either has seen; fills, copies and compares
# memory with string instructions; sleeps; hands a turn to the other and waits for it; has the kernel
# interrupt the other. An interval timer's signals come in between, whose handler overwrites the
# registers. Thread 0 says `round N` after each fourth round; the first mismatch says `FAIL` with
# a letter, and ends the program with status 1.
#
# GNU as, Intel syntax, one section. tools/assemble_statecheck.py makes statecheck.elf of it.

.set ORIGIN,             0x400078       # behind the ELF headers
.set DATA,               0x480000       # zero at first, as far as SIZE says
.set SIZE,               0x200000

# What the threads share, each in a cache line of its own
.set TURN,               DATA
.set MAX_TSC,            DATA + 0x40
.set MAX_NS,             DATA + 0x80
.set TICKS,              DATA + 0xc0
.set SUM,                DATA + 0x100
# What each has, at r14
.set AREAS,              DATA + 0x20000
.set AREA_SHIFT,         17
.set BEFORE,             0
.set AFTER,              0x200
.set SCRATCH,            0x400
.set TIME,               0x440
.set SEEN_TICKS,         0x480
.set SEEN_NS,            0x488
.set TEXT,               0x4c0          # grows down
.set SOURCE,             0x1000
.set COPY,               0xa000
.set COPY_SIZE,          0x8000
.set STACK,              0x1f000        # grows down

.set SYS_write,          1
.set SYS_rt_sigaction,   13
.set SYS_rt_sigreturn,   15
.set SYS_nanosleep,      35
.set SYS_setitimer,      38
.set SYS_clone,          56
.set SYS_futex,          202
.set SYS_sched_setaffinity, 203
.set SYS_clock_gettime,  228
.set SYS_exit_group,     231
.set SYS_membarrier,     324
.set SIGALRM,            14
.set SA_FLAGS,           0x14000000     # SA_RESTORER, SA_RESTART
.set CLONE_FLAGS,        0x50f00        # VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
.set FUTEX_WAIT,         128            # private
.set FUTEX_WAKE,         129
.set PRIVATE_EXPEDITED,  8
.set REGISTER_EXPEDITED, 16
.set CLOCK_MONOTONIC,    1
.set EINTR,              4
.set ETIMEDOUT,          110

.set WORK,               150000         # turns of the checksum's loop
.set TURNS,              3              # a round
.set SLEEP_NS,           1000000
.set QUIET_NS,           500000000      # so long without a signal is too long
.set FXSAVE_QWORDS,      52             # up to XMM15's end
.set MXCSR_MASKS,        0x1f80
.set FCW_EXTENDED,       0x37f
.set ROUND_TEXT_SIZE,    6
.set FAILED_TEXT_SIZE,   26
.set FACTOR,             0x9e3779b1

.macro fail_if condition, letter
    mov     edi, '\letter'
    j\condition fail
.endm

# Keeps the highest value of RDX that either thread has had in `where`; changes RAX.
.macro keep_highest where
    mov     rax, [\where]
keep\@:
    cmp     rdx, rax
    jbe     kept\@
    lock cmpxchg [\where], rdx
    jne     keep\@
kept\@:
.endm

start:
    mov     eax, SYS_rt_sigaction
    mov     edi, SIGALRM
    mov     esi, offset action
    xor     edx, edx
    mov     r10d, 8
    syscall
    mov     eax, SYS_setitimer
    xor     edi, edi
    mov     esi, offset interval
    xor     edx, edx
    syscall
    mov     eax, SYS_membarrier
    mov     edi, REGISTER_EXPEDITED
    xor     esi, esi
    xor     edx, edx
    syscall
    mov     eax, SYS_clone
    mov     edi, CLONE_FLAGS
    mov     esi, AREAS + (1 << AREA_SHIFT) + STACK
    xor     edx, edx
    xor     r10d, r10d
    xor     r8d, r8d
    syscall
    xor     r15d, r15d
    test    rax, rax
    jnz     thread
    inc     r15d

thread:                                 # R15: its number, R14: its area, R13: its round
    mov     r14, r15
    shl     r14, AREA_SHIFT
    add     r14, AREAS
    mov     ecx, r15d
    mov     eax, 1
    shl     eax, cl
    mov     [r14 + SCRATCH], rax
    mov     eax, SYS_sched_setaffinity
    xor     edi, edi
    mov     esi, 8
    lea     rdx, [r14 + SCRATCH]
    syscall
    xor     r13d, r13d
next:
    inc     r13
    call    registers
    call    clocks
    call    strings
    test    r13d, 7
    jnz     awake
    call    asleep
awake:
    mov     r12d, TURNS
again:
    call    turns
    dec     r12d
    jnz     again
    mov     eax, SYS_membarrier
    mov     edi, PRIVATE_EXPEDITED
    xor     esi, esi
    xor     edx, edx
    syscall
    test    rax, rax
    fail_if nz, B
    test    r15d, r15d
    jnz     next
    call    signals
    test    r13d, 3
    jnz     next
    mov     esi, offset round_text
    mov     edx, ROUND_TEXT_SIZE
    call    say
    mov     rax, r13
    call    say_number
    jmp     next

# Registers that stay as they are while others compute.
registers:
    mov     rax, r13
    lea     rax, [rax + rax * 4 + 1]
    add     rax, r15
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    imul    rax, rax, 0x1e3779b1
    add     rax, \n + 1
    movq    xmm\n, rax
    pshufd  xmm\n, xmm\n, 0x1e
.endr
    mov     [r14 + SCRATCH], r13
    mov     eax, r13d
    and     eax, 3
    mov     ecx, eax
    shl     eax, 13                     # rounding
    mov     edx, r13d
    shr     edx, 2
    and     edx, 0x3f                   # flags
    lea     eax, [eax + edx + MXCSR_MASKS]
    mov     [r14 + SCRATCH + 8], eax
    ldmxcsr [r14 + SCRATCH + 8]
    shl     ecx, 10
    or      ecx, FCW_EXTENDED
    mov     [r14 + SCRATCH + 16], ecx
    fninit
    fldcw   word ptr [r14 + SCRATCH + 16]
    fld1
    fldpi
    fld1
    fldl2e
    fild    qword ptr [r14 + SCRATCH]
    fdiv    st, st(1)
    fsqrt
    ffree   st(2)
    fiadd   dword ptr [r14 + SCRATCH]
    fxsave64 [r14 + BEFORE]
    mov     rbx, r13
    not     rbx
    lea     rbp, [r13 + 0x1111]
    lea     r8, [r13 + 0x2222]
    lea     r9, [r13 + 0x3333]
    lea     r10, [r13 + 0x4444]
    lea     r12, [r13 + 0x5555]
    mov     eax, 12345
    mov     edx, FACTOR
    mov     ecx, WORK
    clc
work:
    imul    rax, rdx
    rol     rax, 13
    xor     rax, rcx
    stc
    adc     rax, 7
    push    rax
    pop     rsi
    rcl     rsi, 3
    add     rax, rsi
    dec     ecx
    jnz     work
    fxsave64 [r14 + AFTER]
    mov     rdx, rax
    xor     eax, eax
    lock cmpxchg [SUM], rdx             # the first to come says what it is
    cmp     [SUM], rdx
    fail_if ne, C
    lea     rax, [r13 + 0x1111]
    cmp     rbp, rax
    fail_if ne, G
    lea     rax, [r13 + 0x2222]
    cmp     r8, rax
    fail_if ne, G
    lea     rax, [r13 + 0x3333]
    cmp     r9, rax
    fail_if ne, G
    lea     rax, [r13 + 0x4444]
    cmp     r10, rax
    fail_if ne, G
    lea     rax, [r13 + 0x5555]
    cmp     r12, rax
    fail_if ne, G
    not     rbx
    cmp     rbx, r13
    fail_if ne, G
    lea     rsi, [r14 + BEFORE]
    lea     rdi, [r14 + AFTER]
    mov     ecx, FXSAVE_QWORDS
    repe cmpsq
    fail_if ne, X
    ret

# Time: R11 and RCX are the kernel's to change.
now:                                    # RAX: CLOCK_MONOTONIC in nanoseconds
    mov     eax, SYS_clock_gettime
    mov     edi, CLOCK_MONOTONIC
    lea     rsi, [r14 + TIME]
    syscall
    imul    rax, [r14 + TIME], 1000000000
    add     rax, [r14 + TIME + 8]
    ret

clocks:
    mov     rsi, [MAX_TSC]
    lfence
    rdtsc
    shl     rdx, 32
    or      rdx, rax
    cmp     rdx, rsi
    fail_if b, T
    keep_highest MAX_TSC
    mov     rbx, [MAX_NS]
    call    now
    cmp     rax, rbx
    fail_if b, M
    mov     rdx, rax
    keep_highest MAX_NS
    ret

asleep:
    call    now
    mov     rbx, rax
    mov     eax, SYS_nanosleep
    mov     edi, offset sleep_time
    xor     esi, esi
    syscall
    cmp     rax, -EINTR
    je      woken
    call    now
    sub     rax, rbx
    cmp     rax, SLEEP_NS
    fail_if b, S
woken:
    ret

signals:                                # they come for as long as the program runs
    call    now
    mov     rbx, [TICKS]
    cmp     rbx, [r14 + SEEN_TICKS]
    jne     signalled
    mov     rdx, [r14 + SEEN_NS]
    test    rdx, rdx
    jz      signalled
    neg     rdx
    add     rdx, rax
    cmp     rdx, QUIET_NS
    fail_if a, A
    ret
signalled:
    mov     [r14 + SEEN_TICKS], rbx
    mov     [r14 + SEEN_NS], rax
    ret

strings:
    mov     rax, r13
    imul    rax, rax, 0x01010101
    lea     rdi, [r14 + SOURCE]
    mov     ecx, COPY_SIZE / 8
    rep stosq
    lea     rsi, [r14 + SOURCE]
    lea     rdi, [r14 + COPY]
    mov     ecx, COPY_SIZE
    rep movsb
    lea     rsi, [r14 + SOURCE]
    lea     rdi, [r14 + COPY]
    mov     ecx, COPY_SIZE
    repe cmpsb
    fail_if ne, D
    lea     rsi, [r14 + SOURCE + COPY_SIZE / 2]
    lea     rdi, [r14 + SOURCE + COPY_SIZE / 2 + 8]
    mov     ecx, 1000
    std
    rep movsd                           # downwards
    cld
    lea     rdi, [r14 + SOURCE]
    mov     ecx, COPY_SIZE / 8
    repe scasq
    fail_if ne, D
    ret

# The turn goes from one thread to the other.
turns:
    mov     edx, [TURN]
    cmp     edx, r15d
    je      mine
    mov     eax, SYS_futex
    mov     edi, TURN
    mov     esi, FUTEX_WAIT
    mov     r10d, offset patience
    syscall
    cmp     rax, -ETIMEDOUT
    fail_if e, F
    jmp     turns
mine:
    mov     eax, r15d
    xor     eax, 1
    xchg    [TURN], eax
    mov     eax, SYS_futex
    mov     edi, TURN
    mov     esi, FUTEX_WAKE
    mov     edx, 1
    syscall
    ret

# A signal: everything that the kernel has to restore is overwritten.
handler:
    lock inc qword ptr [TICKS]
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    pxor    xmm\n, xmm\n
.endr
    fninit
    fldz
    fldlg2
    mov     eax, 0x3f80
    push    rax
    ldmxcsr [rsp]
    pop     rax
.irp r, rbx, rbp, r8, r9, r10, r12, r13, r14, r15
    xor     \r, \r
.endr
    ret

returned:
    mov     eax, SYS_rt_sigreturn
    syscall

fail:                                   # EDI: the letter
    mov     [failed_letter], dil
    mov     esi, offset failed_text
    mov     edx, FAILED_TEXT_SIZE
    call    say
    mov     rax, r15
    call    say_number
    mov     rax, r13
    call    say_number
    mov     eax, SYS_exit_group
    mov     edi, 1
    syscall

say_number:                             # RAX, with a newline
    lea     rsi, [r14 + TEXT]
    mov     byte ptr [rsi - 1], 10
    dec     rsi
    mov     ecx, 10
digit:
    xor     edx, edx
    div     rcx
    add     dl, '0'
    dec     rsi
    mov     [rsi], dl
    test    rax, rax
    jnz     digit
    lea     rdx, [r14 + TEXT]
    sub     rdx, rsi
say:                                    # RSI, EDX bytes
    mov     eax, SYS_write
    mov     edi, 1
    syscall
    ret

    .balign 8
action:
    .quad   handler, SA_FLAGS, returned, 0
interval:
    .quad   0, 3000, 0, 3000            # microseconds
sleep_time:
    .quad   0, SLEEP_NS
patience:
    .quad   20, 0
round_text:
    .ascii  "round "
failed_text:
    .ascii  "FAIL "
failed_letter:
    .ascii  "?, thread and round: "
