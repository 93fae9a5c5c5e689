"""Mailboxes give the latest whole record, also while another process writes as fast as it can."""

import os
import subprocess
import sys

import numpy as np

from vla_edge.control.mailbox import Mailbox, SharedBlock

DTYPE = np.dtype([("number", np.int64), ("values", np.float64, (500,))])
LAYOUT = {"first": np.dtype([("x", np.int8)]), "second": DTYPE}


def pair():
    block = SharedBlock(LAYOUT)
    return block, block["second"], SharedBlock(LAYOUT, os.dup(block.descriptor))["second"]


def test_nothing_is_fetched_before_the_first_post_and_each_post_once():
    _, writer, reader = pair()
    assert not reader.fetch()
    writer.fields["number"][...] = 7
    writer.fields["values"][:] = 1.5
    writer.post()
    assert reader.fetch() and reader.fields["number"] == 7 and (reader.fields["values"] == 1.5).all()
    assert not reader.fetch()


def test_the_latest_post_wins():
    _, writer, reader = pair()
    for number in range(5):
        writer.fields["number"][...] = number
        writer.post()
    assert reader.fetch() and reader.fields["number"] == 4


def test_a_short_post_leaves_the_rest_of_the_record():
    _, writer, reader = pair()
    writer.fields["values"][:] = 1.0
    writer.post()
    reader.fetch()
    writer.fields["values"][:] = 2.0
    writer.post(8 + 8 * 3)
    assert reader.fetch()
    assert reader.fields["values"][:4].tolist() == [2.0, 2.0, 2.0, 1.0]


def test_a_record_being_written_or_torn_is_not_taken():
    memory = memoryview(bytearray(Mailbox.size(DTYPE)))
    writer, reader = Mailbox(memory, DTYPE), Mailbox(memory, DTYPE)
    writer.fields["number"][...] = 1
    writer.post()
    reader.fetch()
    header = memory[:24].cast("Q")
    header[0] += 1
    assert not reader.fetch()
    header[0] += 1
    memory[40] ^= 0xFF  # as if the payload had become visible after the sequence
    assert not reader.fetch()
    assert reader.fields["number"] == 1
    writer.post()
    assert reader.fetch()


def test_readers_never_see_a_mixture_while_another_process_writes():
    block, _, reader = pair()
    code = (
        "import sys, numpy as np\n"
        "from vla_edge.control.mailbox import SharedBlock\n"
        f"dtype = np.dtype({DTYPE.descr!r})\n"
        f"box = SharedBlock({{'first': np.dtype([('x', np.int8)]), 'second': dtype}}, {block.descriptor})['second']\n"
        "for number in range(1, 20001):\n"
        "    box.fields['number'][...] = number\n"
        "    box.fields['values'][:] = number\n"
        "    box.post()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=(block.descriptor,), env=environment)
    fetched = last = 0
    while last < 20000 and (child.poll() is None or reader.fetch()):
        fetched += reader.fetch()
        number = int(reader.fields["number"])
        assert (reader.fields["values"] == number).all()
        assert number >= last
        last = number
    assert child.wait(10.0) == 0
    assert last == 20000 and fetched > 0
