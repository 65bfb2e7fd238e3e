"""The tree over events, beside the definitions of RFC 9162 and roots as Certificate Transparency's tests have them."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.runs import merkle

# entries and roots of sizes 1 to 8 in the tests of Google's certificate-transparency and of its successors
ENTRIES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def leaves(entries):
    return [merkle.leaf(entry) for entry in entries]


@pytest.mark.parametrize(("size", "root"), ROOTS.items())
def test_roots_are_the_published_ones(size, root):
    assert merkle.root(leaves(bytes.fromhex(entry) for entry in ENTRIES[:size])).hex() == root


def test_the_root_of_nothing_is_the_hash_of_nothing():
    assert merkle.root([]) == hashlib.sha256(b"").digest()


def test_a_growing_tree_has_the_same_roots():
    tree = merkle.Tree()
    assert tree.root() == merkle.root([])
    for number in range(70):
        tree.append(merkle.leaf(str(number).encode()))
        assert tree.root() == merkle.root(tree.leaves)


def test_by_hand_the_root_of_three():
    a, b, c = (hashlib.sha256(b"\x00" + entry).digest() for entry in (b"a", b"b", b"c"))
    ab = hashlib.sha256(b"\x01" + a + b).digest()
    assert merkle.root(leaves([b"a", b"b", b"c"])) == hashlib.sha256(b"\x01" + ab + c).digest()


@given(st.integers(1, 40), st.data())
def test_a_proof_holds_for_its_entry_its_place_and_its_root_alone(size, data):
    hashed = leaves(str(number).encode() for number in range(size))
    place = data.draw(st.integers(0, size - 1))
    path, root = merkle.proof(hashed, place), merkle.root(hashed)
    assert merkle.is_included(hashed[place], place, size, path, root)
    assert not merkle.is_included(merkle.leaf(b"other"), place, size, path, root)
    assert not merkle.is_included(hashed[place], place, size, path, merkle.leaf(b"other"))
    assert not merkle.is_included(hashed[place], place, size, [*path, root], root)
    assert not path or not merkle.is_included(hashed[place], place, size, path[:-1], root)
    for other in set(range(-1, size + 1)) - {place}:
        assert not merkle.is_included(hashed[place], other, size, path, root) or size == 1
    if path:
        wrong = list(path)
        wrong[data.draw(st.integers(0, len(path) - 1))] = merkle.leaf(b"other")
        assert not merkle.is_included(hashed[place], place, size, wrong, root)
