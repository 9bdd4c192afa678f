/* gemm.c: matrix multiply. Training spends most of its time here.

   `by_three_loops` is the whole operation. The rest of the file computes the same sums faster, by Goto's
   algorithm (Goto and van de Geijn 2008; Van Zee and van de Geijn 2015). The innermost function is `tile`: it
   keeps a small block of c in registers, and adds one outer product to the block in each step. The product is
   of ROWS numbers of a and 2 vectors of b. So a step loads ROWS + 2 operands for 2 ROWS multiply-adds, and
   arithmetic takes the time, not loading. The loops around `tile` keep in a cache what is used again:

       each thread has its own piece of c, and in this piece
       for each WIDTH of columns, for each DEPTH of K:
           pack b: panels of 2 vectors' columns, in the order in which tiles read     (second cache)
           for each HEIGHT of rows:
               for each panel of b                                                    (first cache)
                   for each ROWS rows of a: one tile                                  (registers)

   Packing gives operands of any strides one order, and pads the edges with zeros. NN, NT, TN and odd sizes
   then run the same inner loop. Contiguous rows of a are read in place. Each thread packs the panels that it
   reads: two threads may pack the same panel, but neither waits for the other, or for the other's cache. The
   order of the sum of an element of c does not depend on the number of threads.

   bfloat16: the operands are rounded to 16 bits, and c stays float. In one instruction of AVX512-BF16 a lane
   multiplies a pair of numbers by a pair, and adds both products to its sum: twice as many multiply-adds.
   Packing puts such a pair, two neighbours along K, into one cell of 32 bits. After packing a cell takes the
   place of a number, K is half as long, and the rest is as above. */

static void by_three_loops(const struct gemm *g)
{
    for (size_t i = 0; i < g->M; i++)
        for (size_t j = 0; j < g->N; j++) {
            real total = (g->bias ? g->bias[j] : 0) + (g->add ? g->add[i * g->c_row + j] : 0);
            for (size_t p = 0; p < g->K; p++)
                total += g->a[i * g->a_row + p * g->a_col] * g->b[p * g->b_row + j * g->b_col];
            g->c[i * g->c_row + j] = total;
        }
}

enum { DEPTH = 384, WIDTH = 512, HEIGHT = 16 * ROWS, COLS = 2 * LANES };
enum { SMALL = 1 << 18 }; /* multiply-adds: below this, a second thread would start too late to help */

/* Two numbers in one cell, each rounded to bfloat16, the upper half of a float: to the nearest, ties to an
   even last bit. A NaN stays NaN. */
INLINE real pair(real low, real high)
{
#if REAL_IS_DOUBLE
    return low + 0 * high; /* never called: a double has no cells */
#else
    uint32_t bits[2];
    memcpy(&bits[0], &low, 4), memcpy(&bits[1], &high, 4);
    for (int i = 0; i < 2; i++)
        bits[i] = (bits[i] & 0x7fffffff) > 0x7f800000 ? bits[i] | 0x400000
                                                       : bits[i] + 0x7fff + (bits[i] >> 16 & 1);
    bits[0] = bits[0] >> 16 | (bits[1] & 0xffff0000);
    memcpy(&low, bits, 4);
    return low;
#endif
}

/* acc + x b, lane by lane, with one x for all lanes. For cells, acc plus both products of the pairs. */
INLINE vec multiply_add(const int is_cells, vec acc, const real *x, vec b)
{
    if (!is_cells)
        return acc + *x * b;
    integer bits;
    memcpy(&bits, x, sizeof(bits));
    const ivec a = bits - (ivec){0};
#ifdef BFLOAT16_DOT
    return BFLOAT16_DOT(acc, a, b);
#else
    const ivec upper = (integer)0xffff0000 - (ivec){0};
    acc += (vec)(a << 16) * (vec)((ivec)b << 16);
    return acc + (vec)(a & upper) * (vec)((ivec)b & upper);
#endif
}

/* c[i][j] = from[i][j] + sum over p < depth of a[i a_row + p a_col] b[p b_row + j], for i < rows, j < COLS.
   from NULL means zeros. `rows` is a compile-time constant, so that c is in registers. c is needed only at
   the end: the prefetch brings it from memory while the sums are computed. */
INLINE void tile(const int is_cells, const int rows, real *c, size_t c_row, const real *from, size_t from_row,
                 const real *a, size_t a_row, size_t a_col, const real *b, size_t b_row, size_t depth)
{
    vec acc[ROWS][2];
    UNROLL
    for (int i = 0; i < rows; i++) {
        __builtin_prefetch(c + i * c_row, 1);
        __builtin_prefetch(c + i * c_row + LANES, 1);
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        acc[i][0] = from ? load(from + i * from_row) : (vec){0};
        acc[i][1] = from ? load(from + i * from_row + LANES) : (vec){0};
    }
    for (size_t p = 0; p < depth; p++) {
        vec b0 = load(b + p * b_row), b1 = load(b + p * b_row + LANES);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const real *x = a + i * a_row + p * a_col;
            acc[i][0] = multiply_add(is_cells, acc[i][0], x, b0);
            acc[i][1] = multiply_add(is_cells, acc[i][1], x, b1);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        store(c + i * c_row, acc[i][0]);
        store(c + i * c_row + LANES, acc[i][1]);
    }
}

/* Copies `lines` lines (rows of a, columns of b) of `depth` elements into panels of `full` lines. Zeros fill
   the last panel. Element p of line l goes to out[l / full][p][l % full]. across is the stride from line to
   line, along the stride in a line. full is a compile-time constant. */
INLINE void pack(real *restrict out, const real *restrict in, size_t lines, const size_t full, size_t depth,
                 size_t across, size_t along)
{
    size_t l = 0;
    for (size_t p = 0; p < depth && across == 1; p++) /* reads memory in order */
        for (l = 0; l + full <= lines; l += full)
            memcpy(out + l * depth + p * full, in + l + p * along, full * sizeof(real));
    for (; l < lines; l += full) {
        size_t p = 0;
        for (; along == 1 && l + full <= lines && full % LANES == 0 && p + LANES <= depth; p += LANES)
            for (size_t i = 0; i < full; i += LANES) {
                vec square[LANES];
                for (size_t k = 0; k < LANES; k++)
                    square[k] = load(in + (l + i + k) * across + p);
                transpose(square);
                for (size_t k = 0; k < LANES; k++)
                    store(out + l * depth + (p + k) * full + i, square[k]);
            }
        for (; p < depth; p++)
            for (size_t i = 0; i < full; i++)
                out[l * depth + p * full + i] = l + i < lines ? in[(l + i) * across + p * along] : 0;
    }
}

/* Lines of an operand, rows of a or columns of b: the stride from line to line, and the stride along K. */
struct lines {
    const real *at;
    size_t across, along;
};

/* Writes `lines` lines of `depth` numbers to `out` as cells, in the order of the numbers in memory. */
static struct lines cells_of(real *restrict out, struct lines in, size_t lines, size_t depth)
{
    const size_t cells = depth / 2, odd = depth % 2, all_cells = cells + odd;
    if (in.across == 1 && in.along != 1) {
        for (size_t p = 0; p < cells; p++)
            for (size_t l = 0; l < lines; l++)
                out[p * lines + l] = pair(in.at[2 * p * in.along + l], in.at[(2 * p + 1) * in.along + l]);
        for (size_t l = 0; l < lines && odd; l++)
            out[cells * lines + l] = pair(in.at[2 * cells * in.along + l], 0);
        return (struct lines){out, 1, lines};
    }
    for (size_t l = 0; l < lines; l++) {
        const real *line = in.at + l * in.across;
        if (in.along == 1)
            for (size_t p = 0; p < cells; p++)
                out[l * all_cells + p] = pair(line[2 * p], line[2 * p + 1]);
        for (size_t p = 0; p < cells && in.along != 1; p++)
            out[l * all_cells + p] = pair(line[2 * p * in.along], line[(2 * p + 1) * in.along]);
        if (odd)
            out[l * all_cells + cells] = pair(line[2 * cells * in.along], 0);
    }
    return (struct lines){out, all_cells, 1};
}

/* A slice of K: its first index and its depth, both counted in cells where there are cells. */
struct slice {
    size_t p, depth;
};

/* These lines, cut to a slice of K: the numbers in place, or cells that are written to `room`. */
INLINE struct lines slice_of(const int is_cells, real *room, struct lines in, size_t lines, struct slice k,
                             size_t K)
{
    if (!is_cells)
        return (struct lines){in.at + k.p * in.along, in.across, in.along};
    in.at += 2 * k.p * in.along;
    return cells_of(room, in, lines, least(K - 2 * k.p, 2 * k.depth));
}

/* Computes rows i to i + height and columns j to j + width of c by a tile of `rows` rows: in place, or in a
   copy where the tile is cut at an edge. a and b begin at the slice. */
INLINE void one_tile(const int is_cells, const int rows, const struct gemm *g, struct slice k, const real *a,
                     size_t a_row, size_t a_col, const real *b, size_t b_row, size_t i, size_t j,
                     size_t height, size_t width)
{
    real *c = g->c + i * g->c_row + j, edge[ROWS * COLS] = {0}, *out = c;
    /* the first slice begins with add or bias, a later slice with the sums so far */
    const real *from = k.p ? c : g->add ? g->add + i * g->c_row + j : g->bias ? g->bias + j : NULL;
    size_t from_row = k.p || g->add ? g->c_row : 0, out_row = g->c_row;
    if (height < (size_t)rows || width < COLS) {
        for (size_t r = 0; r < height && from; r++)
            memcpy(edge + r * COLS, from + r * from_row, width * sizeof(real));
        from = out = edge;
        from_row = out_row = COLS;
    }
    tile(is_cells, rows, out, out_row, from, from_row, a, a_row, a_col, b, b_row, k.depth);
    for (size_t r = 0; r < height && out == edge; r++)
        memcpy(c + r * g->c_row, edge + r * COLS, width * sizeof(real));
    if (g->add && g->bias && !k.p)
        for (size_t r = 0; r < height; r++)
            for (size_t l = 0; l < width; l++)
                c[r * g->c_row + l] += g->bias[j + l];
}

/* Rows i0 to i1 of the columns j0 to j1, with b packed. a is packed only where its rows are not contiguous,
   and in the last tile if that has fewer than ROWS rows. */
INLINE void multiply(const int is_cells, const struct gemm *g, struct slice k, real *packed,
                     const real *packed_b, size_t i0, size_t i1, size_t j0, size_t j1)
{
    const struct lines rows = {g->a + i0 * g->a_row, g->a_row, g->a_col};
    const struct lines a = slice_of(is_cells, packed + HEIGHT * k.depth, rows, i1 - i0, k, g->K);
    const size_t whole = a.along == 1 ? (i1 - i0) / ROWS * ROWS : 0; /* these rows are read in place */
    const real *rest = a.at + whole * a.across;
    pack(packed + whole * k.depth, rest, i1 - i0 - whole, ROWS, k.depth, a.across, a.along);
    for (size_t j = j0; j < j1; j += COLS)
        for (size_t i = i0; i < i1; i += ROWS) {
            const size_t height = least(i1 - i, ROWS), width = least(j1 - j, COLS);
            const real *b = packed_b + (j - j0) * k.depth;
            if (i - i0 < whole)
                one_tile(is_cells, ROWS, g, k, a.at + (i - i0) * a.across, a.across, 1, b, COLS, i, j, height,
                         width);
            else
                one_tile(is_cells, ROWS, g, k, packed + (i - i0) * k.depth, 1, ROWS, b, COLS, i, j, height,
                         width);
        }
}

/* c is cut into row_pieces x col_pieces pieces of whole tiles. */
struct grid {
    const struct gemm *g;
    size_t row_pieces, col_pieces;
};

INLINE void pieces(const int is_cells, const void *args, size_t begin, size_t end)
{
    const struct grid *t = args;
    const struct gemm *g = t->g;
    const size_t row_tiles = up(g->M, ROWS) / ROWS, panels = up(g->N, COLS) / COLS;
    const size_t length = is_cells ? (g->K + 1) / 2 : g->K, slices = (length + DEPTH - 1) / DEPTH;
    const size_t depth = (length + slices - 1) / slices, room = (WIDTH + HEIGHT) * depth * (1 + is_cells);
    real *packed_b = scratch(SCRATCH_PRIVATE, room * sizeof(real));
    if (!packed_b)
        return;
    real *cells_b = packed_b + WIDTH * depth, *packed_a = packed_b + WIDTH * depth * (1 + is_cells);
    for (size_t piece = begin; piece < end; piece++) {
        const size_t r = piece / t->col_pieces, s = piece % t->col_pieces;
        const size_t i0 = r * row_tiles / t->row_pieces * ROWS, j0 = s * panels / t->col_pieces * COLS;
        const size_t i1 = least((r + 1) * row_tiles / t->row_pieces * ROWS, g->M);
        const size_t j1 = least((s + 1) * panels / t->col_pieces * COLS, g->N);
        for (size_t j = j0; j < j1; j += WIDTH)
            for (size_t p = 0; p < length; p += depth) {
                const struct slice k = {p, least(length - p, depth)};
                const size_t stop = least(j + WIDTH, j1);
                const struct lines columns = {g->b + j * g->b_col, g->b_col, g->b_row};
                const struct lines b = slice_of(is_cells, cells_b, columns, stop - j, k, g->K);
                pack(packed_b, b.at, stop - j, COLS, k.depth, b.across, b.along);
                for (size_t i = i0; i < i1; i += HEIGHT)
                    multiply(is_cells, g, k, packed_a, packed_b, i, least(i + HEIGHT, i1), j, stop);
            }
    }
}

static void pieces_of_c(const void *args, size_t begin, size_t end) { pieces(0, args, begin, end); }
static void pieces_by_cells(const void *args, size_t begin, size_t end) { pieces(1, args, begin, end); }

/* With a few rows of a, as in generation, each element of b is used a few times, and reading b takes most of
   the time. So b is not packed for one multiply, but read once, in place. Memory is slower where the rows of
   a panel are far apart: if b is the same in every step, `pack_panels` packs it once for all steps. */
enum { FEW = 8, GROUP = 4, BLOCK_ROWS = 4 * ROWS };

/* An item is a block of BLOCK_ROWS rows of a, and one panel of b. The row blocks are the outer loop: with
   many rows a thread has its own rows, as in the kernels before and after, and finds their results in its
   cache. Rows that do not fill a tile of ROWS go to smaller tiles. */
INLINE void panels_by_tiles(const int is_cells, const void *args, size_t begin, size_t end)
{
    const struct gemm *g = args;
    const size_t panels = up(g->N, COLS) / COLS;
    for (size_t item = begin; item < end; item++) {
        const size_t j = item % panels * COLS, width = least(g->N - j, COLS);
        const size_t first = item / panels * BLOCK_ROWS, stop = least(first + BLOCK_ROWS, g->M);
        const struct slice k = {0, g->K};
        const real *b = g->panels ? g->panels + j * g->K : g->b + j;
        size_t b_row = g->panels ? COLS : g->b_row;
        if (width < COLS && !g->panels) {
            real *packed = scratch(SCRATCH_PRIVATE, g->K * COLS * sizeof(real));
            if (!packed)
                return;
            pack(packed, b, width, COLS, g->K, 1, b_row);
            b = packed, b_row = COLS;
        }
        for (size_t i = first, rows; i < stop; i += rows) {
            const real *a = g->a + i * g->a_row;
            rows = stop - i >= ROWS ? ROWS : stop - i >= 4 ? 4 : stop - i >= 2 ? 2 : 1;
            if (rows == ROWS)
                one_tile(is_cells, ROWS, g, k, a, g->a_row, 1, b, b_row, i, j, ROWS, width);
            else if (rows == 4)
                one_tile(is_cells, 4, g, k, a, g->a_row, 1, b, b_row, i, j, 4, width);
            else if (rows == 2)
                one_tile(is_cells, 2, g, k, a, g->a_row, 1, b, b_row, i, j, 2, width);
            else
                one_tile(is_cells, 1, g, k, a, g->a_row, 1, b, b_row, i, j, 1, width);
        }
    }
}

static void panels_of_c(const void *args, size_t begin, size_t end) { panels_by_tiles(0, args, begin, end); }
static void panels_by_cells(const void *args, size_t begin, size_t end)
{
    panels_by_tiles(1, args, begin, end);
}

static void pack_panels_range(const void *args, size_t begin, size_t end)
{
    const struct pack_panels *a = args;
    const size_t depth = a->is_bfloat16 ? (a->K + 1) / 2 : a->K;
    real *room = a->is_bfloat16 ? scratch(SCRATCH_PRIVATE, COLS * depth * sizeof(real)) : NULL;
    if (a->is_bfloat16 && !room)
        return;
    for (size_t j = begin * COLS; j < least(end * COLS, a->N); j += COLS) {
        const size_t columns = least(a->N - j, COLS);
        struct lines b = {a->b + j * a->b_col, a->b_col, a->b_row};
        b = a->is_bfloat16 ? cells_of(room, b, columns, a->K) : b;
        pack(a->out + j * depth, b.at, columns, COLS, depth, b.across, b.along);
    }
}

static void pack_panels(const void *args)
{
    const struct pack_panels *a = args;
    parallel(pack_panels_range, a, up(a->N, COLS) / COLS, 1);
}

/* c[i][j] = row i of a . column j of b, for `rows` rows and `columns` columns. It computes GROUP columns: the
   last one again for each missing column. */
INLINE void dots(const int rows, const struct gemm *g, size_t i, size_t j, size_t columns)
{
    const real *b[GROUP];
    vec acc[GROUP][GROUP];
    UNROLL
    for (size_t l = 0; l < GROUP; l++) {
        b[l] = g->b + (j + least(l, columns - 1)) * g->b_col;
        UNROLL
        for (int r = 0; r < rows; r++)
            acc[r][l] = all(0);
    }
    for (size_t p = 0; p < g->K; p += LANES) {
        vec x[GROUP];
        UNROLL
        for (int r = 0; r < rows; r++)
            x[r] = load_n(g->a + (i + r) * g->a_row + p, g->K - p, 0);
        UNROLL
        for (size_t l = 0; l < GROUP; l++) {
            vec y = load_n(b[l] + p, g->K - p, 0);
            UNROLL
            for (int r = 0; r < rows; r++)
                acc[r][l] += x[r] * y;
        }
    }
    for (int r = 0; r < rows; r++)
        for (size_t l = 0, at = (i + r) * g->c_row + j; l < columns; l++)
            g->c[at + l] = sum(acc[r][l]) + (g->bias ? g->bias[j + l] : 0) + (g->add ? g->add[at + l] : 0);
}

/* For contiguous columns of b, as in the tied head. */
static void few_rows_by_dots(const void *args, size_t begin, size_t end)
{
    const struct gemm *g = args;
    for (size_t j = begin * GROUP; j < least(end * GROUP, g->N); j += GROUP)
        for (size_t i = 0, rows; i < g->M; i += rows) {
            const size_t columns = least(g->N - j, GROUP);
            rows = g->M - i >= 4 ? 4 : g->M - i >= 2 ? 2 : 1;
            if (rows == 4)
                dots(4, g, i, j, columns);
            else if (rows == 2)
                dots(2, g, i, j, columns);
            else
                dots(1, g, i, j, columns);
        }
}

static void gemm(const void *args)
{
    struct gemm copy = *(const struct gemm *)args, *g = &copy;
    if (!g->packed || !*g->packed)
        g->panels = NULL;
    const int is_few = g->M <= FEW && g->K && g->a_col == 1 && !g->is_bfloat16;
    if (g->panels && g->is_bfloat16) {
        real *room = scratch(SCRATCH_SHARED, g->M * (up(g->K, 2) / 2) * sizeof(real));
        if (!room)
            return;
        const struct lines a = cells_of(room, (struct lines){g->a, g->a_row, g->a_col}, g->M, g->K);
        g->a = a.at, g->a_row = g->K = a.across; /* a_col is 1: rows of a become rows of cells */
    }
    if (g->panels || (is_few && g->b_col == 1)) {
        const size_t blocks = up(g->M, BLOCK_ROWS) / BLOCK_ROWS, rows = least(g->M, BLOCK_ROWS);
        parallel(g->is_bfloat16 ? panels_by_cells : panels_of_c, g, up(g->N, COLS) / COLS * blocks,
                 1 + 65536 / (g->K * COLS * rows + 1));
        return;
    }
    if (is_few && g->b_row == 1) {
        parallel(few_rows_by_dots, g, up(g->N, GROUP) / GROUP, 1 + 65536 / (g->K * GROUP));
        return;
    }
    if (!g->K || !g->M || !g->N) { /* empty sums, or an empty c */
        by_three_loops(g);
        return;
    }
    const size_t row_tiles = up(g->M, ROWS) / ROWS, panels = up(g->N, COLS) / COLS;
    const size_t workers = g->M * g->N * g->K < SMALL ? 1 : thread_count();
    struct grid t = {g, 1, 1}; /* one piece for each thread: each piece packs its b, so four cost 4 % more */
    if (g->M >= g->N) { /* cut the longer side */
        t.row_pieces = least(row_tiles, workers);
        t.col_pieces = least(panels, workers / t.row_pieces);
    } else {
        t.col_pieces = least(panels, workers);
        t.row_pieces = least(row_tiles, workers / t.col_pieces);
    }
    parallel(g->is_bfloat16 ? pieces_by_cells : pieces_of_c, &t, t.row_pieces * t.col_pieces, 1);
}

/* Adds a range of columns row by row: x is read in order, and the sums stay in the cache. */
static void column_sum_range(const void *args, size_t begin, size_t end)
{
    const struct column_sum *a = args;
    real *restrict out = a->out;
    memset(out + begin, 0, (end - begin) * sizeof(real));
    for (size_t i = 0; i < a->rows; i++)
        for (size_t j = begin; j < end; j++)
            out[j] += a->x[i * a->cols + j];
}

static void column_sum(const void *args)
{
    const struct column_sum *a = args;
    parallel(column_sum_range, a, a->cols, 64);
}
