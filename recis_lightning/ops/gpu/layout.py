"""Fields of ``ops.layout`` as constants of Triton, and those that only GPU kernels have."""

import triton.language as tl

from recis_lightning.ops import layout as fields

# Header of a table.
ENTRIES = tl.constexpr(fields.ENTRIES)
SHIFT = tl.constexpr(fields.SHIFT)
CAPACITY = tl.constexpr(fields.CAPACITY)
NUM_IDS = tl.constexpr(fields.NUM_IDS)
NEXT_ROW = tl.constexpr(fields.NEXT_ROW)
NUM_FREE = tl.constexpr(fields.NUM_FREE)
NUM_REJECTED = tl.constexpr(fields.NUM_REJECTED)
IS_FULL = tl.constexpr(fields.IS_FULL)
FREE_ROWS = tl.constexpr(fields.FREE_ROWS)
BLOCKS = tl.constexpr(fields.BLOCKS)
BLOCK_SHIFT = tl.constexpr(fields.BLOCK_SHIFT)
ROW_BYTES = tl.constexpr(fields.ROW_BYTES)
LAST_SEEN = tl.constexpr(fields.LAST_SEEN)
INIT_KEY = tl.constexpr(fields.INIT_KEY)
INIT_KIND = tl.constexpr(fields.INIT_KIND)
INIT_ARGS = tl.constexpr(fields.INIT_ARGS)
NUM_STATE = tl.constexpr(fields.NUM_STATE)
STATE_FILL = tl.constexpr(fields.STATE_FILL)
ADMISSION_COUNTER = tl.constexpr(fields.ADMISSION_COUNTER)
COUNTS = tl.constexpr(fields.COUNTS)
LAST_TIME = tl.constexpr(fields.LAST_TIME)

# Index.
LINE_ENTRIES = tl.constexpr(fields.LINE_ENTRIES)
EMPTY = tl.constexpr(fields.EMPTY)
NO_ROW = tl.constexpr(fields.NO_ROW)
CLAIMED = tl.constexpr(fields.CLAIMED)

# Rows of a lookup.
UNKNOWN = tl.constexpr(fields.UNKNOWN)
PADDING = tl.constexpr(fields.PADDING)
MISSING = tl.constexpr(fields.MISSING)

# Segment of a lookup: the fields that it has everywhere, and behind them those of a staged one.
SEGMENT_START = tl.constexpr(fields.SEGMENT_START)
SEGMENT_HEADER = tl.constexpr(fields.SEGMENT_HEADER)
SEGMENT_FLAGS = tl.constexpr(fields.SEGMENT_FLAGS)
SEGMENT_PADDING = tl.constexpr(fields.SEGMENT_PADDING)
SEGMENT_IDS = tl.constexpr(fields.SEGMENT_IDS)
SEGMENT_END = tl.constexpr(8)  # position behind its last id
SEGMENT_FIRST_CHUNK = tl.constexpr(9)  # its first program
SEGMENT_END_CHUNK = tl.constexpr(10)  # behind its last program
SEGMENT_TABLE = tl.constexpr(11)  # index of its table among those of the call
SEGMENT_STEP = tl.constexpr(12)  # its table's step
SEGMENT_IS_LAST = tl.constexpr(13)  # whether no later segment asks its table
SEGMENT_TIME = tl.constexpr(14)  # its table's time of the lookup
SEGMENT_LOOKUP = tl.constexpr(15)  # number of its table's training lookups, this one included
STAGED_SEGMENT_SIZE = tl.constexpr(16)
STAGED_SEGMENT_BYTES = tl.constexpr(8 * 16)

HAS_PADDING = tl.constexpr(fields.HAS_PADDING)
INSERT = tl.constexpr(fields.INSERT)
CHECK_ADMISSION = tl.constexpr(fields.CHECK_ADMISSION)
TOUCH = tl.constexpr(fields.TOUCH)

# Plan of a lookup or an update.
PLAN_FIRST_ID = tl.constexpr(fields.PLAN_FIRST_ID)
PLAN_HEADER = tl.constexpr(fields.PLAN_HEADER)
PLAN_MODE = tl.constexpr(fields.PLAN_MODE)
PLAN_NUM_BAGS = tl.constexpr(fields.PLAN_NUM_BAGS)
PLAN_BAG_LENGTH = tl.constexpr(fields.PLAN_BAG_LENGTH)
PLAN_OFFSETS = tl.constexpr(fields.PLAN_OFFSETS)
PLAN_WEIGHTS = tl.constexpr(fields.PLAN_WEIGHTS)
PLAN_TILE_LEN = tl.constexpr(fields.PLAN_TILE_LEN)
PLAN_DATA = tl.constexpr(fields.PLAN_DATA)
PLAN_DATA_STRIDE = tl.constexpr(fields.PLAN_DATA_STRIDE)
PLAN_FIRST_CHUNK = tl.constexpr(fields.PLAN_FIRST_CHUNK)
PLAN_ROWS = tl.constexpr(fields.PLAN_ROWS)
PLAN_NUM_IDS = tl.constexpr(fields.PLAN_NUM_IDS)
PLAN_FLAT_BASE = tl.constexpr(fields.PLAN_FLAT_BASE)
PLAN_BYTES = tl.constexpr(8 * fields.PLAN_SIZE)
PLAN_AND_SEGMENT_BYTES = tl.constexpr(8 * (fields.PLAN_SIZE + fields.SEGMENT_SIZE))

SUM = tl.constexpr(fields.SUM)
MEAN = tl.constexpr(fields.MEAN)
TILE = tl.constexpr(fields.TILE)
MEAN_BY_COUNT = tl.constexpr(fields.MEAN_BY_COUNT)

# Optimizers' rules and hyperparameters.
SGD = tl.constexpr(fields.SGD)
ADAGRAD = tl.constexpr(fields.ADAGRAD)
ROWWISE_ADAGRAD = tl.constexpr(fields.ROWWISE_ADAGRAD)
ADAM = tl.constexpr(fields.ADAM)
MOMENTUM = tl.constexpr(fields.MOMENTUM)
RMSPROP = tl.constexpr(fields.RMSPROP)
ROWWISE_ADAM = tl.constexpr(fields.ROWWISE_ADAM)
FTRL = tl.constexpr(fields.FTRL)
LION = tl.constexpr(fields.LION)
ADAM_AR = tl.constexpr(fields.ADAM_AR)
NORM = tl.constexpr(-1)  # a rule that updates nothing

HYPER_LR = tl.constexpr(fields.HYPER_LR)
HYPER_EPS = tl.constexpr(fields.HYPER_EPS)
HYPER_ONE_MINUS_BETA1 = tl.constexpr(fields.HYPER_ONE_MINUS_BETA1)
HYPER_ONE_MINUS_BETA2 = tl.constexpr(fields.HYPER_ONE_MINUS_BETA2)
HYPER_INV_SQRT_BIAS2 = tl.constexpr(fields.HYPER_INV_SQRT_BIAS2)
HYPER_DECAY = tl.constexpr(fields.HYPER_DECAY)
HYPER_SCALE = tl.constexpr(fields.HYPER_SCALE)
HYPER_CLIP = tl.constexpr(fields.HYPER_CLIP)
HYPER_COW_LEAST = tl.constexpr(fields.HYPER_COW_LEAST)
HYPER_COW_RATIO = tl.constexpr(fields.HYPER_COW_RATIO)
HYPER_ALPHA = tl.constexpr(fields.HYPER_ALPHA)
HYPER_UPDATE = tl.constexpr(fields.HYPER_UPDATE)
HYPER_WEIGHT_DECAY = tl.constexpr(fields.HYPER_WEIGHT_DECAY)
HYPER_MOMENTUM = tl.constexpr(fields.HYPER_MOMENTUM)
HYPER_OF_BUFFER = tl.constexpr(fields.HYPER_OF_BUFFER)
HYPER_OF_GRADIENT = tl.constexpr(fields.HYPER_OF_GRADIENT)
HYPER_L1 = tl.constexpr(fields.HYPER_L1)
HYPER_L2 = tl.constexpr(fields.HYPER_L2)
HYPER_BETA = tl.constexpr(fields.HYPER_BETA)
HYPER_MARKS = tl.constexpr(fields.HYPER_MARKS)

# Header of an admission counter.
ADMISSION_KIND = tl.constexpr(fields.ADMISSION_KIND)
ADMISSION_THRESHOLD = tl.constexpr(fields.ADMISSION_THRESHOLD)
ADMISSION_FORGET_AFTER = tl.constexpr(fields.ADMISSION_FORGET_AFTER)
ADMISSION_PER_BATCH = tl.constexpr(fields.ADMISSION_PER_BATCH)
ADMISSION_COUNTERS = tl.constexpr(fields.ADMISSION_COUNTERS)
ADMISSION_WIDTH = tl.constexpr(fields.ADMISSION_WIDTH)
ADMISSION_NUM_HASHES = tl.constexpr(fields.ADMISSION_NUM_HASHES)
ADMISSION_NUM_BLOCKS = tl.constexpr(fields.ADMISSION_NUM_BLOCKS)
ADMISSION_ADDED = tl.constexpr(fields.ADMISSION_ADDED)

COUNT = tl.constexpr(fields.COUNT)
SKETCH = tl.constexpr(fields.SKETCH)
COUNT_MASK = tl.constexpr(fields.COUNT_MASK)
MAX_COUNTER = tl.constexpr(fields.MAX_COUNTER)

# Distributions of initial rows.
INIT_CONSTANT = tl.constexpr(fields.INIT_CONSTANT)
INIT_UNIFORM = tl.constexpr(fields.INIT_UNIFORM)
INIT_TRUNCATED_NORMAL = tl.constexpr(fields.INIT_TRUNCATED_NORMAL)
