"""The header of a table: everything a kernel must know of it, in one int64 vector.

A table writes its header when it grows, and kernels read it through its address. So a launch over
a group of tables needs no more than a list of header addresses, and nothing is rebuilt when one of
the tables changes.
"""

from __future__ import annotations

HEADER_SIZE = 32

# Index.
ENTRIES = 0  # address of int64 [capacity + 1, 2]
SHIFT = 1  # 64 - log2(capacity): a search starts at the line of the hash's top bits
CAPACITY = 2
NUM_IDS = 3
# Rows.
NEXT_ROW = 4  # rows from here on were never used
NUM_FREE = 5
NUM_REFUSED = 6  # occurrences in training lookups that were not admitted
FREE_ROWS = 21  # address of int64 [n], a stack of freed rows
BLOCKS = 7  # address of int64 [num_blocks], each a block's address
BLOCK_SHIFT = 8  # log2(rows in a block)
ROW_BYTES = 9
# Policy columns.
LAST_SEEN = 10  # address of int64 [rows], or 0 where no policy asks for it
STEP = 11
# Initial rows.
INIT_KEY = 12  # hash of (seed, table name)
INIT_KIND = 13
INIT_ARGS = 14  # four float64 bit patterns: 14, 15, 16, 17
# Optimizer state behind the weights.
NUM_STATE = 18  # float32 words of state in a row
STATE_FILL = 19  # float64 bit pattern: what they start from
NUM_UPDATES = 20  # optimizer steps that had a gradient for the table
# Admission.
SIGHTINGS = 22  # address of the header of what a screening policy remembers; see admission
# More policy columns, as LAST_SEEN.
COUNTS = 23  # address of int64 [rows], occurrences in training lookups
LAST_TIME = 24  # address of int64 [rows], when the last one was, in microseconds
TIME = 25  # what a training lookup writes there

# Entries of a cache line, 64 bytes, at whose first one every search starts: nearly all end in it.
LINE_ENTRIES = 4
EMPTY = -(2**63)  # the key of an empty entry; this id itself lives in the extra entry at the end
NO_ROW = 2**63 - 1  # the row of an empty entry
CLAIMED = 2**62  # row field of an id being inserted: CLAIMED | its first position in the batch

UNKNOWN = -1  # a lookup's row: the id has none (not known, not admitted)
PADDING = -2  # a lookup's row: the id is the feature's padding_idx
MISSING = -3  # within find_or_insert: the id is to be inserted

# A segment of a lookup: the ids of one feature, int64 [num_segments, SEGMENT_SIZE]. Positions count
# all ids of the call, segment after segment; every segment's ids are read where they lie.
SEGMENT_SIZE = 8
SEGMENT_START = 0  # position of its first id
SEGMENT_HEADER = 1  # its table's header address
SEGMENT_FLAGS = 2
SEGMENT_PADDING = 3  # its padding_idx, where it has one
SEGMENT_IDS = 4  # address of its ids less 8 * start: the id at position p lies at this + 8 * p

HAS_PADDING = 1  # flag: the feature has a padding_idx
INSERT = 2  # flag: unknown ids of the feature get a row
SCREEN = 4  # flag: those that the table's admission policy lets in
STAMP = 8  # flag: training lookups write COUNTS or LAST_TIME
