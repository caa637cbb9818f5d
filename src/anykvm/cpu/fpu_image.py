"""The x87 unit between this vCPU and the host's: control words, and the images of FSAVE and
FXSAVE (SDM vol. 1, 8.1 and 10.5).

x87 instructions are executed by the host's own x87 unit. While native code runs, the host's
control word is the guest's with all exceptions masked, its register stack is empty between
instructions, and the exception flags that it has collected are a subset of those in
`State.fpu_sw`; so an instruction can add the host's flags to the guest's without clearing
anything first.
"""

from __future__ import annotations

from anykvm.cpu.guest import R_IMM, Guest, Routine
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.mxcsr import read_mxcsr, write_mxcsr
from anykvm.cpu.state import offset_of

MASKS = 0x3F  # of the control word; the exception flags of the status word have the same places
CW_VALID, CW_FIXED, CW_INIT = 0x1F3F, 0x40, 0x37F
SW_EXCEPTION, SW_BUSY, SW_TOP = 0x80, 0x8000, 0x3800
EMPTY_TAGS = 0x5555
MXCSR_VALID = 0xFFFF
INTEGER_BIT = 1 << 63
CR4_OSFXSR = 9

# FSAVE's image in 32-bit protected mode
I_CW, I_SW, I_TAG, I_IP, I_CS_OP, I_DP, I_DS, I_ST = 0, 4, 8, 12, 16, 20, 24, 28
# FXSAVE's
X_CW, X_SW, X_TAG, X_OP, X_IP, X_DP, X_MXCSR, X_MASK = 0, 2, 4, 6, 8, 16, 24, 28
X_ST, X_XMM = 32, 160

CLOBBERS = ",".join(f"~{{st({n})}}" if n else "~{st}" for n in range(8)) + (
    ",~{memory},~{fpsr},~{fpcr},~{flags},~{dirflag}"
)


def assembly(f: Guest, text: str, result: str, constraints: str, *args: Value) -> Value:
    """Inline assembly (Intel syntax, `;` between instructions) that may use the whole x87 unit."""
    arguments = ", ".join(f"{a.type} {a.text}" for a in args)
    joined = constraints + "," + CLOBBERS if constraints else CLOBBERS
    call = f'call {result} asm sideeffect inteldialect "{text}", "{joined}"({arguments})'
    if result != "void":
        return f.emit(call, result)
    f.line(call)
    return Value(f, "undef", "void")


# The host's unit
def enter(f: Routine) -> Value:
    """Makes the host's x87 unit the guest's; gives where its own control word is kept."""
    kept = Value(f, f.local("i16").ptr, PTR)
    assembly(f, "fnstcw word ptr [$0]", "void", "r", kept)
    clear_flags(f)
    load_control(f)
    f.set("fpu_top", top_of(f.get("fpu_sw")))
    return kept


def leave(f: Routine, kept: Value) -> None:
    """Gives the host's x87 unit back."""
    resolve_pointers(f)
    clear_flags(f)
    assembly(f, "fldcw word ptr [$0]", "void", "r", kept)


def clear_flags(f: Guest) -> None:
    """Whenever flags of the guest were cleared, so must be the host's."""
    assembly(f, "fnclex", "void", "")


def load_control(f: Guest) -> None:
    """Puts rounding and precision of `State.fpu_cw` into force."""
    word = f.field("x87_image")
    word.store(f.get("fpu_cw") | MASKS)
    assembly(f, "fldcw word ptr [$0]", "void", "r", word)


def summarize(sw: Value, cw: Value) -> Value:
    """A status word with ES and B as its flags and the control word's masks say."""
    pending = (sw & ~cw & MASKS).ne(0)
    summary = pending.select(sw.f.const(SW_EXCEPTION | SW_BUSY, 16), sw.f.const(0, 16))
    return (sw & ~(SW_EXCEPTION | SW_BUSY)) | summary


def set_control(f: Guest, cw: Value) -> None:
    """As FLDCW: flags that are set already become pending if now unmasked."""
    cw = (cw & CW_VALID) | CW_FIXED
    f.set("fpu_cw", cw)
    set_status(f, summarize(f.get("fpu_sw"), cw))
    load_control(f)


def set_status(f: Guest, sw: Value) -> None:
    """Sets the status word, TOP included."""
    f.set("fpu_sw", sw)
    f.set("fpu_top", top_of(sw))


def initialize(f: Guest) -> None:
    """As FNINIT (SDM vol. 1, 8.1.2); the registers keep their contents."""
    f.set("fpu_cw", CW_INIT)
    set_status(f, f.const(0, 16))
    f.set("fpu_tag", 0xFFFF)
    for name in ("fpu_op", "fpu_ip", "fpu_dp", "fpu_pc"):
        f.set(name, 0)
    assembly(f, "fninit", "void", "")


# Registers and tags
def physical(f: Guest, top: Value, n: int) -> Value:
    """Number of the register that ST(n) is; `top` has 64 bits."""
    return (top + n) & 7 if n else top


def register(f: Guest, number: Value) -> Value:
    return f.field("st").offset(number << 4)


def top_of(sw: Value) -> Value:
    return (sw.zext(64) >> 11) & 7


def empties(tags: Value) -> Value:
    """Bit 2n set for each register n that is empty, of a tag word in that order."""
    return tags & (tags >> 1) & EMPTY_TAGS


def full_tags(f: Guest) -> Value:
    """The tag word with 0 valid, 1 zero, 2 special, 3 empty, from the registers' contents."""
    tags = f.get("fpu_tag")
    result = f.const(0, 16)
    for n in range(8):
        at = f.field(f"st[{n}]")
        mantissa, exponent = at.load("i64"), at.offset(8).load("i16") & 0x7FFF
        special = exponent.eq(0) | exponent.eq(0x7FFF) | mantissa.sge(0)
        zero = exponent.eq(0) & mantissa.eq(0)
        kind = zero.select(f.const(1, 16), special.select(f.const(2, 16), f.const(0, 16)))
        empty = ((tags >> (2 * n)) & 3).eq(3)
        result = result | (empty.select(f.const(3, 16), kind) << (2 * n))
    return result


def copy_registers(f: Guest, image: Value, stride: int, *, out: bool) -> None:
    """Between ST(0) ... ST(7) and an image."""
    top = f.get("fpu_top")
    for n in range(8):
        own, other = register(f, physical(f, top, n)), image.offset(n * stride)
        source, target = (own, other) if out else (other, own)
        target.store(source.load("i64"))
        high = source.offset(8).load("i16")
        if out and stride == 16:
            target.offset(8).store(high.zext(64))
        else:
            target.offset(8).store(high)


def resolve_pointers(f: Guest) -> None:
    """FIP and FOP of the instruction that was the last to note where it stands."""
    pc = f.get("fpu_pc")
    with f.If(pc.ne(0)):
        index = (pc - f.get("records")) >> 2
        f.set("fpu_ip", (f.get("records_rip") + index).to_ptr().load("i64"))
        f.set("fpu_op", pc.to_ptr().offset(R_IMM).load("i16"))
        f.set("fpu_pc", 0)


def x87_pack() -> Routine:
    """x87_pack(): `State.x87_image` from the x87 state, in the format of 32-bit protected mode."""
    f = Routine("x87_pack", "void")
    resolve_pointers(f)
    image = f.field("x87_image")
    for at, value in ((I_CW, f.get("fpu_cw")), (I_SW, f.get("fpu_sw")), (I_TAG, full_tags(f))):
        image.offset(at).store(value.zext(32) | 0xFFFF_0000)
    image.offset(I_IP).store(f.get("fpu_ip").trunc(32))
    image.offset(I_CS_OP).store(f.get("fpu_op").zext(32) << 16)
    image.offset(I_DP).store(f.get("fpu_dp").trunc(32))
    image.offset(I_DS).store(f.const(0xFFFF_0000, 32))
    copy_registers(f, image.offset(I_ST), 10, out=True)
    return f


def x87_unpack() -> Routine:
    """x87_unpack(): status, tags and registers from `State.x87_image`."""
    f = Routine("x87_unpack", "void")
    image = f.field("x87_image")
    set_status(f, image.offset(I_SW).load("i16"))
    f.set("fpu_tag", image.offset(I_TAG).load("i16"))
    copy_registers(f, image.offset(I_ST), 10, out=False)
    return f


# FXSAVE's image
def abridged(tags: Value) -> Value:
    """A bit for each register that is not empty (i8)."""
    x = ~empties(tags) & EMPTY_TAGS
    for shift, mask in ((1, 0x3333), (2, 0x0F0F), (4, 0x00FF)):
        x = (x | (x >> shift)) & mask
    return x.trunc(8)


def unabridged(tags: Value) -> Value:
    """The tag word of an abridged one, 0 or 3 each."""
    x = ~tags.zext(16) & 0xFF
    for shift, mask in ((4, 0x0F0F), (2, 0x3333), (1, EMPTY_TAGS)):
        x = (x | (x << shift)) & mask
    return x | (x << 1)


def fx_pack() -> Routine:
    """fx_pack(wide): `State.fx_image` from the state; `wide` for 64-bit pointers."""
    f = Routine("fx_pack", "void", ("wide", "i1"))
    resolve_pointers(f)
    image = f.field("fx_image")
    image.offset(X_CW).store(f.get("fpu_cw"))
    image.offset(X_SW).store(f.get("fpu_sw"))
    image.offset(X_TAG).store(abridged(f.get("fpu_tag")).zext(16))
    image.offset(X_OP).store(f.get("fpu_op"))
    for at, pointer in ((X_IP, f.get("fpu_ip")), (X_DP, f.get("fpu_dp"))):
        image.offset(at).store(f["wide"].select(pointer, pointer & 0xFFFF_FFFF))
    image.offset(X_MXCSR).store(read_mxcsr(f))
    image.offset(X_MASK).store(f.const(MXCSR_VALID, 32))
    copy_registers(f, image.offset(X_ST), 16, out=True)
    for n in range(16):
        image.offset(X_XMM + 16 * n).store(f.field(f"xmm[{n}]").load("<2 x i64>"))
    return f


def fx_unpack() -> Routine:
    """fx_unpack(wide, xmms): the state from `State.fx_image`: x87, and if `xmms` is not 0, MXCSR
    and that many XMM registers.
    """
    f = Routine("fx_unpack", "void", ("wide", "i1"), ("xmms", "i64"))
    image = f.field("fx_image")
    set_status(f, image.offset(X_SW).load("i16"))
    f.set("fpu_tag", unabridged(image.offset(X_TAG).load("i8")))
    f.set("fpu_pc", 0)
    f.set("fpu_op", image.offset(X_OP).load("i16") & 0x7FF)
    for at, name in ((X_IP, "fpu_ip"), (X_DP, "fpu_dp")):
        pointer = image.offset(at).load("i64")
        f.set(name, f["wide"].select(pointer, pointer & 0xFFFF_FFFF))
    copy_registers(f, image.offset(X_ST), 16, out=False)
    clear_flags(f)
    set_control(f, image.offset(X_CW).load("i16"))
    for first, count in ((0, 8), (8, 16)):
        with f.If(f["xmms"].ugt(first)):
            for n in range(first, count):
                value = image.offset(X_XMM + 16 * n).load("<2 x i64>")
                f.field(f"xmm[{n}]").store(value)
    with f.If(f["xmms"].ne(0)):
        write_mxcsr(f, image.offset(X_MXCSR).load("i32"))
    f.ret()
    return f


# Infinities
def get(at: Value) -> tuple[Value, Value]:
    """Mantissa, and sign with exponent; in the parts in which the x87 unit stores a register, so
    that the loads need not wait.
    """
    return at.load("i64"), at.offset(8).load("i16")


def put(at: Value, value: tuple[Value, Value]) -> None:
    at.store(value[0])
    at.offset(8).store(value[1])


def x87_infinity() -> Routine:
    """x87_infinity(a, b, result, product): whether the sum or product of the registers at `a` and
    `b` is an infinity because one of them is, and no exception comes of it; then `result` has it.
    """
    f = Routine("x87_infinity", "i1", ("a", PTR), ("b", PTR), ("result", PTR), ("product", "i1"))
    infinite, usable, signs = [], [], []
    for mantissa, high in (get(f["a"]), get(f["b"])):
        exponent = high & 0x7FFF
        infinite.append(exponent.eq(0x7FFF) & mantissa.eq(INTEGER_BIT))
        number = mantissa.slt(0) & exponent.ne(0) & exponent.ne(0x7FFF)
        usable.append(infinite[-1] | number)
        signs.append(high & 0x8000)
    opposite = infinite[0] & infinite[1] & signs[0].ne(signs[1]) & (f["product"] ^ 1)
    known = (infinite[0] | infinite[1]) & usable[0] & usable[1] & (opposite ^ 1)
    with f.If(known):
        sign = f["product"].select(signs[0] ^ signs[1], infinite[0].select(*signs))
        put(f["result"], (f.const(INTEGER_BIT, 64), sign | 0x7FFF))
    f.ret(known)
    return f


ROUTINES = (x87_pack, x87_unpack, fx_pack, fx_unpack, x87_infinity)

assert offset_of("st[1]") - offset_of("st[0]") == 16
