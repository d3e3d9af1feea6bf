"""Layout of all vectors and matrices that host and kernels share, field by field.

A table's header holds everything that kernels must know of it, in one int64 vector. The table
writes it when it grows, and kernels read it through its address. So a launch over a group of tables
needs the addresses of their headers only, and nothing is rebuilt when one of the tables changes.
"""

from __future__ import annotations

HEADER_SIZE = 32

# Header of a table: index.
ENTRIES = 0  # address of int64 [capacity + 1, 2]
SHIFT = 1  # 64 - log2(capacity): a search starts at the line of the hash's top bits
CAPACITY = 2
NUM_IDS = 3
# Rows.
NEXT_ROW = 4  # first row that was never used
NUM_FREE = 5
NUM_REJECTED = 6  # occurrences in training lookups that were not admitted
IS_FULL = 7  # beside a GPU: whether an id found no entry in the index, which must never happen
FREE_ROWS = 21  # address of int64 [n], a stack of freed rows
BLOCKS = 26  # address of int64 [num_blocks], the addresses of the blocks
BLOCK_SHIFT = 8  # log2(rows in a block)
ROW_BYTES = 9
MAPPED = 27  # rows from one on lie in a mapped file: 1 + its number; 0 where none do
# Policy columns.
LAST_SEEN = 10  # address of int64 [rows], or 0 where no policy asks for it
STEP = 11
# Initial rows.
INIT_KEY = 12  # hash of (seed, table name)
INIT_KIND = 13
INIT_ARGS = 14  # four float64 bit patterns: 14, 15, 16, 17
# Optimizer state behind the weights.
NUM_STATE = 18  # float32 words of state in a row
STATE_FILL = 19  # float64 bit pattern: their initial value
NUM_UPDATES = 20  # optimizer steps that had a gradient for the table
# Admission.
ADMISSION_COUNTER = 22  # address of the admission counter's header
# More policy columns, as LAST_SEEN.
COUNTS = 23  # address of int64 [rows], occurrences in training lookups
LAST_TIME = 24  # address of int64 [rows], time of the last one in microseconds
TIME = 25  # time that a training lookup writes there

# Entries of a cache line, 64 bytes. A search starts at the first entry of one, and nearly always
# ends in it.
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
CHECK_ADMISSION = 4  # flag: only if the table's admission policy admits them
TOUCH = 8  # flag: training lookups write COUNTS or LAST_TIME of their rows

# Plan of a lookup or an update: one line a feature, int64 [num_features, PLAN_SIZE].
PLAN_SIZE = 16
PLAN_FIRST_ID = 0  # position of the feature's first id among all ids of the call
PLAN_HEADER = 1  # its table's header address
PLAN_MODE = 2
PLAN_NUM_BAGS = 3
PLAN_BAG_LENGTH = 4  # ids in every bag, or -1 where PLAN_OFFSETS holds their bounds
PLAN_OFFSETS = 5  # address of int64 [num_bags + 1]
PLAN_WEIGHTS = 6  # address of float32 [num_ids], or 0
PLAN_TILE_LEN = 7
PLAN_DATA = 8  # address of the output (or of its gradient)
PLAN_DATA_STRIDE = 9  # bytes from one bag of it to the next
PLAN_FIRST_CHUNK = 10  # split of the work; the backend fills these two
PLAN_BAGS_PER_CHUNK = 11
PLAN_ROWS = 12  # address of the rows of its ids
PLAN_NUM_IDS = 13
PLAN_FLAT_BASE = 14  # index of its table's first row among those of all tables
PLAN_COUNTED = 15  # 1 where a float32 behind each gradient counts its ids; 0: each is one id's

NONE, SUM, MEAN, TILE, MEAN_BY_COUNT = range(5)

# Rules of optimizers, and hyperparameters of a table, float32 [HYPER_SIZE].
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, MOMENTUM, RMSPROP, ROWWISE_ADAM, FTRL, LION = range(9)
ADAM_AR = 9
COUPLED_DECAY = 16  # added to a rule's number: g += HYPER_WEIGHT_DECAY * w comes before the rule
COW_CLIP = 32  # added to a rule's number: a row's gradient is clipped by its weights' norm first

HYPER_SIZE = 16
HYPER_LR = 0  # learning rate, with Adam's first bias correction or Adagrad's decay in it
HYPER_EPS = 1  # Adam: as added after the second bias correction
HYPER_ONE_MINUS_BETA1 = 2  # 1 - beta1, rounded once: in float32, 1 - 0.999 is off by 5e-5 of itself
HYPER_ONE_MINUS_BETA2 = 3  # 1 - beta2
HYPER_INV_SQRT_BIAS2 = 4  # 1 / sqrt(1 - beta2 ** step)
HYPER_DECAY = 5  # factor of the weights before the update: 1 - lr * weight_decay
HYPER_SCALE = 6  # factor of gradients (norm clipping)
HYPER_CLIP = 7  # bound of every gradient element (value clipping), inf where there is none
HYPER_WEIGHT_DECAY = 8  # of COUPLED_DECAY
HYPER_MOMENTUM, HYPER_OF_BUFFER, HYPER_OF_GRADIENT = 9, 10, 11  # MOMENTUM alone
HYPER_L1, HYPER_L2, HYPER_BETA = 9, 10, 11  # FTRL alone
HYPER_ALPHA, HYPER_UPDATE = 9, 10  # ADAM_AR alone: base rate; number of the update, from 1
# Two words, an int64: address of the table's uint8 [rows] of marks, less the index of its first row
# among those of all tables, or 0 where nobody asks which rows change. An update clears its row's.
HYPER_MARKS = 12
HYPER_COW_RATIO, HYPER_COW_LEAST = 14, 15  # of COW_CLIP

# Header of an admission counter. Its index (ENTRIES, SHIFT, CAPACITY, NUM_IDS) is as a table's.
ADMISSION_KIND = 8
ADMISSION_THRESHOLD = 9  # occurrences that admit (COUNT, SKETCH); probability * 2**53 (DRAW)
ADMISSION_NUM_LOOKUPS = 10  # training lookups so far, the present one included
ADMISSION_FORGET_AFTER = 11
ADMISSION_PER_BATCH = 12  # whether an id counts once a lookup, however often it occurs
ADMISSION_COUNTERS = 13  # address of uint8 [num_blocks, num_hashes, width]
ADMISSION_WIDTH = 14
ADMISSION_NUM_HASHES = 15
ADMISSION_NUM_BLOCKS = 16
ADMISSION_ADDED = 17  # address of int64 [num_blocks]: occurrences since a block was last halved

COUNT, SKETCH, DRAW = 1, 2, 3
COUNT_MASK = (1 << 32) - 1
MAX_LOOKUPS = 1 << 30  # lookups and count share an entry's second word, below CLAIMED
MAX_COUNTER = 255

# Row fields to copy: one line a field, int64 [num_fields, ROW_FIELD_SIZE].
ROW_FIELD_SIZE = 4
ROW_FIELD_DATA = 0  # address of the field's tensor
ROW_FIELD_STRIDE = 1  # bytes from one row of it to the next; 0 if all rows share one
ROW_FIELD_FIRST_BYTE = 2  # offset of the field in a table's row
ROW_FIELD_NUM_BYTES = 3

# Rows of one feature among those of a lookup, int64 [num_spans, SPAN_SIZE].
SPAN_SIZE = 3
SPAN_ADDRESS = 0  # of int64 rows, one feature's
SPAN_NUM_ROWS = 1
SPAN_TABLE = 2  # index of their table

# Distributions of initial rows: INIT_KIND.
INIT_CONSTANT, INIT_UNIFORM, INIT_NORMAL, INIT_TRUNCATED_NORMAL = range(4)
