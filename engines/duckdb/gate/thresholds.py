"""What a statement may be in size and shape, each with what was measured without it (DuckDB 1.5.5, one busy core).

What these let through may still be too much for its limits: the deadline and the child's memory end that.
"""

# Before any parser sees the text.
MAX_SQL_BYTES = 262_144

# 1,800 open brackets hang the parser, and brackets cost it quadratic time. What people write stays below 20.
MAX_BRACKET_DEPTH = 64

# 6,000 bytes of `x.a.a.a` keep the binder busy without end; nested data is seldom deeper than 6.
MAX_DOTTED_CHAIN = 16

# 4,096 comments of 48 characters cost the tokenizer 4 s, and 50,000 nested ones more than 20 s; 64 cost 0.3 s at most.
MAX_BLOCK_COMMENTS = 64

# 200,000 tokens take 2 s and 13 MB of JSON to judge; a list of 25,000 ids takes 0.3 s.
MAX_TOKENS = 50_000

# What the parser writes out more than once: 160,000 nodes of a named window are 14 MB of tree and take 0.4 s.
MAX_COPIES = 200_000

# In the tree. 250 operands in a row bind in 0.3 s, and the time grows with the square.
MAX_EXPRESSION_DEPTH = 250

# Each level of these doubles what DuckDB binds: 12 take 0.15 s, 16 take 4 s and 700 MB, 20 have no end.
MAX_DOUBLINGS = 12

# Joins of hundreds of sources keep the optimizer busy without end; 64 lateral ones take 0.5 s.
MAX_SOURCES = 64

# CTEs that use each other twice double: 2^11 sources bind in 0.1 s, 2^15 in 4 s.
MAX_EXPANDED_SOURCES = 2_048

# 400 SELECTs in a UNION run in 0.04 s, 1,600 in 1 s; nested, they are as deep as the walk may go.
MAX_SELECTS = 400

# 2,000 columns are described and written in 0.8 s, 4,000 in 2.3 s; 131,000 held a child for a minute.
MAX_COLUMNS = 2_000

# Names in a SELECT may stand for one another, each twice: 2^12 take 0.1 s, 2^16 have no end.
MAX_EXPANDED_NAMES = 4_096

# CUBE over 6 columns is 64 sets and 190 MB; over 10 it is 1,024 and does not fit into 1 GB.
MAX_GROUPING_SETS = 64

# A single value larger than this belongs into a parameter, which no parser has to read.
MAX_LITERAL_CHARACTERS = 131_072

# What one function call may be told to multiply a value by, in rows or characters: 10^9 took 9 GB.
MAX_AMPLIFICATION = 10_000_000
