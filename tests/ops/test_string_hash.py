"""Hashes of strings: vectors of the public packages, and kernels against the reference.

The vectors are those of xxhash 4.1.0, cityhash 0.4.10 (``Fingerprint64``, ``FarmHash64WithSeed``),
mmh3 5.3.1 (``hash64(...)[0]``) and libstdc++'s ``std::_Hash_bytes``, which is MurmurHash64A.
"""

import numpy as np
import pytest

from recis_lightning.ops import backend
from recis_lightning.ops.string_hash import HASHES, hash_strings

LENGTHS = (0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)
TEXTS = [bytes((i * 37 + 11) % 256 for i in range(length)) for length in LENGTHS]
VECTORS = {
    ("xxh64", 0): [
        0xEF46DB3751D8E999,
        0xF592C0C7639C4CB6,
        0x22C08528601D4F27,
        0xFB1E5CF2F1AE4D95,
        0x5613AC510496C04E,
        0x57CB2B7521F3E21A,
        0xC3F1D09775257B66,
        0x90A9714EB00E8D29,
        0xC6843CEF99721174,
        0xF72E5E622B272AD6,
        0xE4A0E629E519A4AE,
        0xCC6B8AAADA790B2D,
        0x35EC49850475A832,
        0xBF9F0BA3CF95B28A,
        0x155CCCE4BF32BEFC,
        0xDA5EE441A595CFB8,
        0xF648961449461A69,
        0x01166E04DA0EA4A8,
        0x46F0E2B6282DD4FB,
        0x2F074B6DD9094E34,
    ],
    ("xxh64", 2654435761): [
        0xAC75FDA2929B17EF,
        0xE7FDA85A72454615,
        0x5CBB7F85404A1F73,
        0x9994339DD3CF0D91,
        0xC53CCE27AE03AD38,
        0xCD44F16C92A699DF,
        0xCED5D92CDCFA8C0E,
        0x7E324962958B9116,
        0xB788C04F43B5EFA5,
        0xC14E0ED654CD87E8,
        0x9FAB920EF1FC4E09,
        0x881C3285B30B5A93,
        0x207074871E91CB01,
        0xE28C6289B8031861,
        0x90535F3E4EAE4016,
        0xAD88DF0E9F033F82,
        0x86B133216A999AD1,
        0x269005A8D5B58D8D,
        0xDCD3640EEC842D67,
        0x8D6659E70BA08787,
    ],
    ("farmhash64", 0): [
        0x9AE16A3B2F90404F,
        0x4271B80E2915C76A,
        0x373A2B2A12E0C581,
        0xCC1E778137AE6D69,
        0x960838FBC6D9C975,
        0x7D507025ED4EECFD,
        0xDAEBBBB958304DDE,
        0x834F200CFA7ED95F,
        0xD836480326A974D6,
        0x5CDED6CB65C9DAC6,
        0x52A467E87C92D522,
        0xA03300E1B2BE6DA7,
        0x839154CA67815696,
        0x7CF64A4BD1B2B67E,
        0x000F03EAC52D3535,
        0xFB360C5023F60DB6,
        0xD70E348FCBF64D04,
        0x33EF435F17AF1739,
        0xC30A81B637D2E4DD,
        0x51320A19A60CBD6E,
    ],
    ("farmhash64", 3): [
        0xE8EF19426F5D9D90,
        0x6911B72A6D7212E6,
        0xD35947792E8EA5D7,
        0x263595E42F559B3F,
        0xE85672535004BD68,
        0x57829F73010ABD6B,
        0x026043EA5A77EE7A,
        0x041C149FA2C2BD77,
        0x7916A2D6F25A495B,
        0x665772E6276DFC2C,
        0x8E4077191106E8C3,
        0x18BE445953908D48,
        0xD65D426C2224AFAD,
        0xE3D2C3A2C3C92415,
        0xF924D51F50CDDEC4,
        0x418B61AAED80EF63,
        0xF4320F3B935864C8,
        0x42C8610D183B54DB,
        0x6122AC93278E33AD,
        0x26429503C8A94D47,
    ],
    ("murmur3", 0): [
        0x0000000000000000,
        0x932FC7CCE617F1E7,
        0x6AFAC0B8DE81A4B1,
        0xD3A4EED1B81F9F72,
        0x8340CC686662983B,
        0xF0B144007F89CED7,
        0xDBB3088EAEC8A0B1,
        0x2906F047B67F83FF,
        0xDA9C66580C5EF0FB,
        0x78B8EE9A775E07D1,
        0xB1CA061ED4C5532F,
        0xAF7374EB8EFE799B,
        0x08B88A88C3099BA9,
        0x281925E2603553EE,
        0x497867A35161E107,
        0x11FD61FDCA4CFBE2,
        0x524078234BF66128,
        0x27625E36B3CA4BE2,
        0x23FCFEE2DD52F108,
        0xF5225377274C360A,
    ],
    ("murmur3", 4294967295): [
        0x6AF1DF4D9D3BC9EC,
        0x024D662FED410084,
        0xD99BE2E0648DAEFB,
        0xA35273AB3E09778A,
        0xCCFE9D24279074CF,
        0xE8C3A5E74B3AF919,
        0x54347EB9F0CE0718,
        0x797EF50A52C26DD6,
        0x06D3FC3376FE6236,
        0x2FDD79FEF11A1539,
        0x2F3A479DAF996E67,
        0x20F39E2335A3CC0D,
        0x36697D1C1A3AC3AF,
        0x826F960BC4805E13,
        0x8F7696537E6DE585,
        0xA73D90A502BB3E9B,
        0x964D96ED94C872D9,
        0xA855B78EF814C955,
        0xAA4C96DF808B9359,
        0xE931FF61C3565DC2,
    ],
    ("murmur64a", 0): [
        0x0000000000000000,
        0x0D5D347E79E917EA,
        0xEB79FA711A44BB47,
        0x866263788AB3E2F7,
        0x83D6D69C8462799C,
        0x30D784EB06D314DF,
        0x5C59B94E255FADDA,
        0xD69656F62C12EB42,
        0x9F365EC0ADFE3BC9,
        0xEB75EEFB93381CE5,
        0xEBD3AACF38BE7371,
        0xF0CD6F6C5128ED8B,
        0x63B6791EDB74512F,
        0x015ED17378539FCF,
        0x601F78F9E8C32BC6,
        0x675EF8EC325DA150,
        0xB7141F05560A5BD5,
        0x28C3E7BF1B76B3A8,
        0xF1B44E98E94D7854,
        0xE9E4E6A18CE8FD97,
    ],
    ("murmur64a", 7): [
        0x6E80950782BDBE12,
        0xC8F8DEDF145135E8,
        0xD186B14AAEC88F55,
        0xAD302F98A85CB3AF,
        0x156F8FC49D50BB7E,
        0xB41086630CE274C8,
        0xD502C2BEC9FE121A,
        0xD3C10030EF557C63,
        0xBAB08704136EFFCA,
        0xF3B83B04F85F1FE8,
        0x8AFC6CE994D6BED1,
        0xD5577CD7C0AA1D25,
        0xF8BF832B67F31DF7,
        0x82B9A39FDF6DEEFC,
        0x1DB2FA7488D3BB75,
        0xCEDF637B251F9D36,
        0x04B9274D4F96286B,
        0xC9F8081AA88F957E,
        0xA928ECEB667E2265,
        0x34FCC83FF1A5B712,
    ],
}


def laid_out(texts, dtype=np.int64, before=b""):
    """Return the bytes of texts one after the other, and their offsets."""
    data = np.frombuffer(before + b"".join(texts), np.uint8)
    return data, np.cumsum([len(before), *map(len, texts)]).astype(dtype)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("kind", "seed"), VECTORS, ids=str)
def test_published_vectors(name, dtype, kind, seed):
    """At every length at which an algorithm changes its way."""
    with backend.use(name):
        found = hash_strings(*laid_out(TEXTS, dtype, b"abc"), kind, seed).numpy().view(np.uint64)
    assert [hex(value) for value in found] == [hex(value) for value in VECTORS[kind, seed]]


@pytest.mark.parametrize(("kind", "most"), [(kind, most) for kind, (_, most) in HASHES.items()])
def test_kernels_agree_with_the_reference(kind, most):
    """For all lengths to 300, more strings than a chunk has, all byte values and large seeds."""
    random = np.random.default_rng(0)
    texts = [random.bytes(length) for length in range(300)]
    many = [random.bytes(length) for length in random.integers(0, 20, 9000)]
    for strings, seed in ((texts, 0), (texts, most), (many, 12345)):
        data, offsets = laid_out(strings)
        with backend.use("reference"):
            expected = hash_strings(data, offsets, kind, seed)
        assert (hash_strings(data, offsets, kind, seed) == expected).all()
        assert len(set(expected.tolist())) >= len(set(strings)) - 1


def test_no_strings():
    data, offsets = laid_out([])
    assert hash_strings(data, offsets, "xxh64", 0).shape == (0,)


def test_few_strings_load_no_kernels(monkeypatch):
    """Their hashes are the same, of course; many are hashed by kernels, as is all from then on."""
    monkeypatch.setattr(backend, "_loaded", {})

    def hashes(count):
        data = np.arange(count * 3).astype(np.uint8)
        return hash_strings(data, np.arange(count + 1) * 3, "xxh64", 0)

    few = hashes(5)
    assert list(backend._loaded) == [("string_hash", "reference")]
    assert hashes(300)[:5].equal(few)
    assert ("string_hash", "cpu") in backend._loaded
    assert hashes(5).equal(few)
