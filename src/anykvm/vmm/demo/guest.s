# The demo's guest: every processor goes from real mode to long mode and counts under its timer.
#
# All of them begin at `start`, in the state that a SIPI leaves: processor 0 because the machine puts
# it there, the others because processor 0 sends them INIT and SIPI (SDM volume 3, 9.4.4). They take
# themselves through protected mode to long mode (10.9 and 10.8.5) and count, each for itself and
# together in one number, while the timers of their local APICs interrupt them (11.5.4). In the end
# the number that they share must be the sum of their own: then 0 goes to the exit port.
#
# GNU as, Intel syntax (in which 1b is a number, so no label is called 1), one section.
# tools/assemble_demo.py makes guest.bin of it, for ORIGIN.

# Devices
.set SERIAL_DATA,        0x3f8
.set SERIAL_STATUS,      0x3fd
.set TRANSMITTER_EMPTY,  0x20
.set EXIT_PORT,          0xf4

# Physical memory; all of it is mapped onto itself.
.set ORIGIN,             0x8000
.set SIPI_VECTOR,        ORIGIN >> 12
.set BOOT_STACK,         ORIGIN         # growing down; one processor boots at a time
.set PML4,               0x10000
.set PDPT,               0x11000
.set DIRECTORIES,        0x12000        # four, for 4 GiB
.set IDT,                0x16000
.set COMMON,             0x17000        # what processors share, away from the code
.set CLEARED_SIZE,       0x8000         # from PML4 on
.set PROCESSORS,         0x20000        # a page each: variables below, stack above
.set PAGE_SHIFT,         12
.set MAX_PROCESSORS,     64

# A processor's own variables, at GS:0, and the common ones, at R14
.set TICKS,              0
.set TURNS,              4
.set CPUS,               0
.set READY,              4
.set DONE,               8
.set CONSOLE,            12
.set SHARED,             64             # in a cache line of its own

# Selectors, control registers, MSRs
.set CODE32,             0x08
.set CODE64,             0x10
.set DATA,               0x18
.set CR0_PE,             1 << 0
.set CR0_CACHE_OFF,      3 << 29        # CD and NW, set by a reset
.set CR0_PG,             1 << 31
.set CR4_PAE,            1 << 5
.set MSR_EFER,           0xc0000080
.set EFER_LME,           1 << 8
.set MSR_GS_BASE,        0xc0000101
.set PRESENT_WRITE,      3
.set PAGE_2M,            1 << 7
.set LARGE_PAGE,         1 << 21
.set INTERRUPT_GATE,     0x8e00
.set EXCEPTIONS,         32
.set CPUID_HTT,          28

# The local APIC
.set LAPIC,              0xfee00000
.set EOI,                0x0b0
.set SPURIOUS,           0x0f0
.set ICR_LOW,            0x300
.set ICR_HIGH,           0x310
.set LVT_TIMER,          0x320
.set TIMER_INITIAL,      0x380
.set TIMER_CURRENT,      0x390
.set TIMER_DIVIDE,       0x3e0
.set SOFTWARE_ENABLE,    1 << 8
.set ICR_INIT,           0x4500
.set ICR_STARTUP,        0x4600 | SIPI_VECTOR
.set LVT_MASKED,         1 << 16
.set LVT_PERIODIC,       1 << 17
.set DIVIDE_BY_1,        0xb
.set TIMER_VECTOR,       0x20
.set SPURIOUS_VECTOR,    0xff
.set MILLISECOND,        1000000        # of KVM's timer, which counts nanoseconds
.set WANTED_TICKS,       10

# Text on the serial line, out of any mode: the string instructions take SI, ESI or RSI as the mode
# has it. EAX, ECX, EDX, ESI and EDI are lost.
.macro printer mode
print_\mode:                            # the text at ESI, up to a zero byte
    lodsb
    test al, al
    jz 2f
    mov ah, al
    mov dx, SERIAL_STATUS
4:  in al, dx
    test al, TRANSMITTER_EMPTY
    jz 4b
    mov al, ah
    mov dx, SERIAL_DATA
    out dx, al
    jmp print_\mode
2:  ret

print_decimal_\mode:                    # EAX
    mov esi, offset digits_end
    mov ecx, 10
4:  xor edx, edx
    div ecx
    add dl, '0'
    dec esi
    mov [esi], dl
    test eax, eax
    jnz 4b
    jmp print_\mode
.endm

.macro say mode, text
    mov esi, offset text\@
    call print_\mode
    .subsection 1
text\@: .asciz "\text"
    .subsection 0
.endm

.macro say_number mode, value
    mov eax, \value
    call print_decimal_\mode
.endm

.macro say_who mode                     # the processor's number is in EBP at all times
    say \mode, "CPU "
    say_number \mode, ebp
    say \mode, ": "
.endm

# Real mode

    .code16
start:
    cli
    cld
    ljmp 0, offset real_mode            # CS's base becomes 0, so that labels are addresses
real_mode:
    xor eax, eax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, offset BOOT_STACK
    mov eax, 1
    cpuid
    shr ebx, 24                         # the initial APIC id, which here is the number
    mov ebp, ebx
    say_who 16
    say 16, "real mode\n"
    lgdt [gdt_pointer]
    mov eax, cr0
    or eax, CR0_PE
    mov cr0, eax
    ljmp CODE32, offset protected_mode

    printer 16

# Protected mode

    .code32
protected_mode:
    mov eax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    say_who 32
    say 32, "protected mode\n"
    test ebp, ebp
    jnz enter_long_mode
    call build_page_tables
enter_long_mode:
    mov eax, cr4
    or eax, CR4_PAE
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, cr0
    and eax, ~CR0_CACHE_OFF
    or eax, CR0_PG
    mov cr0, eax
    ljmp CODE64, offset long_mode

build_page_tables:                      # 4 GiB onto itself, in pages of 2 MiB
    mov edi, PML4
    xor eax, eax
    mov ecx, CLEARED_SIZE / 4
    rep stosd
    mov edi, PML4
    mov dword ptr [edi], PDPT | PRESENT_WRITE
    mov edi, PDPT
    mov eax, DIRECTORIES | PRESENT_WRITE
    mov ecx, 4
4:  mov [edi], eax
    add edi, 8
    add eax, 0x1000
    loop 4b
    mov edi, DIRECTORIES
    mov eax, PRESENT_WRITE | PAGE_2M
    mov ecx, 4 * 512
2:  mov [edi], eax
    add edi, 8
    add eax, LARGE_PAGE
    loop 2b
    ret

    printer 32

# Long mode

    .code64
long_mode:
    mov ebx, ebp
    shl ebx, PAGE_SHIFT
    add ebx, PROCESSORS                 # RBX: this processor's page
    lea rsp, [rbx + 4096]
    mov ecx, MSR_GS_BASE
    mov eax, ebx
    xor edx, edx
    wrmsr
    say_who 64
    say 64, "long mode\n"
    test ebp, ebp
    jnz 4f
    call build_idt
4:  lidt [rip + idt_pointer]
    mov r14d, COMMON                    # R14: the common variables
    mov r15d, LAPIC                     # R15: the local APIC
    mov dword ptr [r15 + SPURIOUS], SOFTWARE_ENABLE | SPURIOUS_VECTOR
    mov dword ptr [r15 + TIMER_DIVIDE], DIVIDE_BY_1
    test ebp, ebp
    jnz 2f
    call wake_others
2:  lock inc dword ptr [r14 + READY]
3:  pause                               # nobody counts before all are there
    mov eax, [r14 + READY]
    cmp eax, [r14 + CPUS]
    jb 3b
    call count
    lock inc dword ptr [r14 + DONE]
    test ebp, ebp
    jz conclude
halt:
    cli
    hlt
    jmp halt

build_idt:                              # exceptions end the demo; the timer and nothing else
    mov ecx, EXCEPTIONS
    mov edi, IDT
    mov eax, offset exceptions
4:  call set_gate
    add eax, 5                          # the size of a CALL, which is all that an entry is
    loop 4b
    mov edi, IDT + 16 * TIMER_VECTOR
    mov eax, offset timer_interrupt
    call set_gate
    mov edi, IDT + 16 * SPURIOUS_VECTOR
    mov eax, offset spurious_interrupt
set_gate:                               # EAX into the gate at EDI, which then is the next one
    mov [rdi], ax
    mov word ptr [rdi + 2], CODE64
    mov word ptr [rdi + 4], INTERRUPT_GATE
    mov word ptr [rdi + 6], 0
    mov qword ptr [rdi + 8], 0
    add edi, 16
    ret

wake_others:                            # one after the other: they boot on the same stack
    mov dword ptr [r14 + CPUS], 1
    mov eax, 1
    cpuid
    bt edx, CPUID_HTT
    jnc 9f
    shr ebx, 16
    movzx ebx, bl
    mov [r14 + CPUS], ebx
    mov r12d, 1
4:  cmp r12d, ebx
    jae 9f
    say_who 64
    say 64, "INIT and SIPI to CPU "
    say_number 64, r12d
    say 64, "\n"
    mov eax, r12d
    shl eax, 24
    mov [r15 + ICR_HIGH], eax
    mov dword ptr [r15 + ICR_LOW], ICR_INIT
    call wait_10_ms
    mov [r15 + ICR_HIGH], eax
    mov dword ptr [r15 + ICR_LOW], ICR_STARTUP
2:  pause
    cmp [r14 + READY], r12d
    jb 2b
    inc r12d
    jmp 4b
9:  ret

wait_10_ms:                             # by the timer, without its interrupt
    mov dword ptr [r15 + LVT_TIMER], LVT_MASKED | TIMER_VECTOR
    mov dword ptr [r15 + TIMER_INITIAL], 10 * MILLISECOND
4:  pause
    cmp dword ptr [r15 + TIMER_CURRENT], 0
    jne 4b
    ret

count:                                  # until there have been WANTED_TICKS interrupts
    mov dword ptr [r15 + LVT_TIMER], LVT_PERIODIC | TIMER_VECTOR
    mov dword ptr [r15 + TIMER_INITIAL], 100 * MILLISECOND
    sti
    xor r12d, r12d                      # ticks told of
4:  lock inc dword ptr [r14 + SHARED]
    inc dword ptr gs:[TURNS]
    cmp gs:[TICKS], r12d
    je 4b
    inc r12d
    call tell_tick
    cmp r12d, WANTED_TICKS
    jb 4b
    cli
    mov dword ptr [r15 + LVT_TIMER], LVT_MASKED | TIMER_VECTOR
    call lock_console
    say_who 64
    say 64, "long mode, "
    say_number 64, r12d
    say 64, " timer interrupts\n"
    jmp unlock_console

tell_tick:
    call lock_console
    say_who 64
    say 64, "timer interrupt "
    say_number 64, r12d
    say 64, ", counted to "
    say_number 64, gs:[TURNS]
    say 64, "\n"
    jmp unlock_console

lock_console:
    mov eax, 1
4:  xchg eax, [r14 + CONSOLE]
    test eax, eax
    jz 2f
    pause
    jmp 4b
2:  ret

unlock_console:
    mov dword ptr [r14 + CONSOLE], 0
    ret

conclude:                               # processor 0, when all have counted
    mov eax, [r14 + CPUS]
4:  pause
    cmp [r14 + DONE], eax
    jb 4b
    mov ebx, PROCESSORS
    xor r12d, r12d
2:  add r12d, [rbx + TURNS]
    add ebx, 1 << PAGE_SHIFT
    dec eax
    jnz 2b
    say_number 64, [r14 + CPUS]
    say 64, " CPUs counted "
    say_number 64, r12d
    say 64, " together and "
    say_number 64, [r14 + SHARED]
    say 64, " in all\n"
    xor eax, eax
    cmp r12d, [r14 + SHARED]
    setne al
exit:                                   # AL: the status
    mov dx, EXIT_PORT
    out dx, al
    jmp halt

    printer 64

# Interrupts

timer_interrupt:
    inc dword ptr gs:[TICKS]
    mov dword ptr [r15 + EOI], 0
spurious_interrupt:
    iretq

exceptions:
    .rept EXCEPTIONS
    call unexpected
    .endr
unexpected:                             # whose return address tells the vector
    pop rbx
    say_who 64
    say 64, "unexpected exception "
    mov eax, ebx
    sub eax, offset exceptions + 5
    xor edx, edx
    mov ecx, 5
    div ecx
    call print_decimal_64
    say 64, "\n"
    mov al, 2
    jmp exit

# Data

    .subsection 1
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            # CODE32
    .quad 0x00af9b000000ffff            # CODE64
    .quad 0x00cf93000000ffff            # DATA
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
idt_pointer:
    .word 16 * 256 - 1
    .quad IDT
    .skip 10
digits_end:
    .byte 0
