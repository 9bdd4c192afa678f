/* gemm.c: matrix multiply, the operation that training spends its time in.

   Goto's algorithm (Goto and van de Geijn 2008; Van Zee and van de Geijn 2015). At the bottom, `tile` keeps a
   small block of c in registers and adds to it one outer product a step: ROWS numbers of a times 2 vectors of
   b. A step loads ROWS + 2 operands for 2 ROWS multiply-adds, so arithmetic, not loading, is what takes the
   time. Around it, blocking keeps what is used again close:

       for each DEPTH of K, for each WIDTH of columns:
           pack b: panels of 2 vectors' columns, in the order in which tiles read     (outer cache)
           for each block of rows, shared by the threads:
               for each panel of b                                                    (inner cache)
                   for each ROWS rows of a: one tile                                  (registers)

   Packing turns any strides into one order and pads the edges with zeros, so NN, NT, TN and odd sizes all run
   the same inner loop. Rows of a that are contiguous are read where they lie. Each element of c is summed in
   one order, whatever the threads do. */

enum { DEPTH = 256, WIDTH = 1024, BLOCK_ROWS = 16 * ROWS, COLS = 2 * LANES };

/* c[i][j] = from[i][j] + sum over p < depth of a[i a_row + p a_col] b[p b_row + j], for i < rows, j < COLS.
   from NULL is zeros. `rows` is a compile-time constant, so that c lives in registers. */
INLINE void tile(const int rows, real *c, size_t c_row, const real *from, size_t from_row, const real *a,
                 size_t a_row, size_t a_col, const real *b, size_t b_row, size_t depth)
{
    vec acc[ROWS][2];
    UNROLL
    for (int i = 0; i < rows; i++) {
        acc[i][0] = from ? load(from + i * from_row) : (vec){0};
        acc[i][1] = from ? load(from + i * from_row + LANES) : (vec){0};
    }
    for (size_t p = 0; p < depth; p++) {
        vec b0 = load(b + p * b_row), b1 = load(b + p * b_row + LANES);
        UNROLL
        for (int i = 0; i < rows; i++) {
            real x = a[i * a_row + p * a_col];
            acc[i][0] += x * b0;
            acc[i][1] += x * b1;
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        store(c + i * c_row, acc[i][0]);
        store(c + i * c_row + LANES, acc[i][1]);
    }
}

/* Copies a panel: `width` lines (rows of a, columns of b) of `depth` elements to out[p * full + i], zeros
   from width on. across is the stride from line to line, along the stride in a line; full is a constant. */
INLINE void pack(real *restrict out, const real *restrict in, size_t width, const size_t full, size_t depth,
                 size_t across, size_t along)
{
    size_t p = 0;
    if (width == full && across == 1)
        for (; p < depth; p++)
            memcpy(out + p * full, in + p * along, full * sizeof(real));
    else if (width == full && along == 1 && full % LANES == 0)
        for (; p + LANES <= depth; p += LANES)
            for (size_t i = 0; i < full; i += LANES) {
                vec square[LANES];
                for (size_t l = 0; l < LANES; l++)
                    square[l] = load(in + (i + l) * across + p);
                transpose(square);
                for (size_t l = 0; l < LANES; l++)
                    store(out + (p + l) * full + i, square[l]);
            }
    for (; p < depth; p++)
        for (size_t i = 0; i < full; i++)
            out[p * full + i] = i < width ? in[i * across + p * along] : 0;
}

/* One DEPTH x WIDTH block of b, and the grid of tasks that multiplies it. */
struct block {
    const struct gemm *g;
    real *packed_b;
    size_t depth_begin, depth, col_begin, cols; /* cols in columns, not panels */
    size_t row_pieces, col_pieces;
};

static void pack_b(const void *args, size_t begin, size_t end)
{
    const struct block *t = args;
    const struct gemm *g = t->g;
    for (size_t panel = begin; panel < end; panel++) {
        const size_t j = panel * COLS, width = least(t->cols - j, COLS);
        const real *b = g->b + t->depth_begin * g->b_row + (t->col_begin + j) * g->b_col;
        pack(t->packed_b + j * t->depth, b, width, COLS, t->depth, g->b_col, g->b_row);
    }
}

/* c's rows i to i + height, columns j to j + width: whole tiles in place, edges by way of a copy. b is the
   panel; a is packed where it must be: when its rows have gaps, and at the bottom, where rows are missing. */
static void one_tile(const struct block *t, const real *packed_a, const real *b, size_t i, size_t j,
                     size_t height, size_t width)
{
    const struct gemm *g = t->g;
    real *c = g->c + i * g->c_row + j, edge[ROWS * COLS] = {0}, *out = c;
    const int first = t->depth_begin == 0; /* the others add to what is there */
    const real *from = first ? g->bias ? g->bias + j : NULL : c;
    size_t from_row = first ? 0 : g->c_row, out_row = g->c_row;
    if (height < ROWS || width < COLS) {
        for (size_t r = 0; r < height && from; r++)
            memcpy(edge + r * COLS, from + r * from_row, width * sizeof(real));
        from = out = edge;
        from_row = out_row = COLS;
    }
    const real *a = packed_a ? packed_a : g->a + i * g->a_row + t->depth_begin;
    if (packed_a)
        tile(ROWS, out, out_row, from, from_row, a, 1, ROWS, b, COLS, t->depth);
    else
        tile(ROWS, out, out_row, from, from_row, a, g->a_row, 1, b, COLS, t->depth);
    for (size_t r = 0; r < height && out == edge; r++)
        memcpy(c + r * g->c_row, edge + r * COLS, width * sizeof(real));
}

/* A task is a piece of the rows and a piece of the panels. */
static void multiply(const void *args, size_t begin, size_t end)
{
    const struct block *t = args;
    const struct gemm *g = t->g;
    const size_t row_tiles = (g->M + ROWS - 1) / ROWS, panels = (t->cols + COLS - 1) / COLS;
    real *packed = scratch(SCRATCH_PRIVATE, BLOCK_ROWS * t->depth * sizeof(real));
    for (size_t task = begin; task < end; task++) {
        const size_t r = task / t->col_pieces, s = task % t->col_pieces;
        const size_t stop = least((r + 1) * row_tiles / t->row_pieces * ROWS, g->M);
        for (size_t i0 = r * row_tiles / t->row_pieces * ROWS; i0 < stop; i0 += BLOCK_ROWS) {
            const size_t i1 = least(i0 + BLOCK_ROWS, stop);
            for (size_t i = i0; i < i1; i += ROWS)
                if (g->a_col != 1 || i1 - i < ROWS)
                    pack(packed + (i - i0) * t->depth, g->a + i * g->a_row + t->depth_begin * g->a_col,
                         least(i1 - i, ROWS), ROWS, t->depth, g->a_row, g->a_col);
            for (size_t panel = s * panels / t->col_pieces; panel < (s + 1) * panels / t->col_pieces; panel++)
                for (size_t i = i0; i < i1; i += ROWS) {
                    const size_t j = panel * COLS;
                    const int in_place = g->a_col == 1 && i1 - i >= ROWS;
                    one_tile(t, in_place ? NULL : packed + (i - i0) * t->depth, t->packed_b + j * t->depth, i,
                             t->col_begin + j, least(i1 - i, ROWS), least(t->cols - j, COLS));
                }
        }
    }
}

/* A few rows of a, as in generation, use each element of b a few times: reading b is most of what it
   takes. So b is not packed for one multiply but read once, as it lies. Memory is slower where a panel's rows
   lie apart; who multiplies by the same b at every step packs it once for all of them: see `pack_panels`. */
enum { FEW = 8, GROUP = 4, FEW_ROWS = 4 * ROWS };

/* An item is FEW_ROWS rows of a and a panel of b, row blocks outermost: with many rows a thread has its own,
   as in the kernels before and after, and what they wrote is in its cache. What whole tiles leave of the rows
   makes smaller ones. */
static void panels_by_tiles(const void *args, size_t begin, size_t end)
{
    const struct gemm *g = args;
    const size_t panels = up(g->N, COLS) / COLS;
    for (size_t item = begin; item < end; item++) {
        const size_t j = item % panels * COLS, width = least(g->N - j, COLS);
        const size_t first = item / panels * FEW_ROWS, stop = least(first + FEW_ROWS, g->M);
        const real *b = g->packed ? g->b + j * g->K : g->b + j, *bias = g->bias ? g->bias + j : NULL;
        size_t b_row = g->packed ? COLS : g->b_row;
        real edge[ROWS * COLS], edge_bias[COLS];
        if (width < COLS && !g->packed) {
            real *packed = scratch(SCRATCH_PRIVATE, g->K * COLS * sizeof(real));
            pack(packed, b, width, COLS, g->K, 1, b_row);
            b = packed, b_row = COLS;
        }
        if (width < COLS && bias)
            bias = memcpy(edge_bias, bias, width * sizeof(real));
        for (size_t i = first, rows; i < stop; i += rows) {
            const real *a = g->a + i * g->a_row;
            real *c = width < COLS ? edge : g->c + i * g->c_row + j;
            const size_t c_row = width < COLS ? COLS : g->c_row;
            rows = stop - i >= ROWS ? ROWS : stop - i >= 4 ? 4 : stop - i >= 2 ? 2 : 1;
            if (rows == ROWS)
                tile(ROWS, c, c_row, bias, 0, a, g->a_row, 1, b, b_row, g->K);
            else if (rows == 4)
                tile(4, c, c_row, bias, 0, a, g->a_row, 1, b, b_row, g->K);
            else if (rows == 2)
                tile(2, c, c_row, bias, 0, a, g->a_row, 1, b, b_row, g->K);
            else
                tile(1, c, c_row, bias, 0, a, g->a_row, 1, b, b_row, g->K);
            for (size_t r = 0; r < rows && c == edge; r++)
                memcpy(g->c + (i + r) * g->c_row + j, edge + r * COLS, width * sizeof(real));
        }
    }
}

static void pack_panels_range(const void *args, size_t begin, size_t end)
{
    const struct pack_panels *a = args;
    for (size_t j = begin * COLS; j < least(end * COLS, a->N); j += COLS)
        pack(a->out + j * a->K, a->b + j * a->b_col, least(a->N - j, COLS), COLS, a->K, a->b_col, a->b_row);
}

static void pack_panels(const void *args)
{
    const struct pack_panels *a = args;
    parallel(pack_panels_range, a, up(a->N, COLS) / COLS, 1);
}

/* c[i][j] = a's row i . b's column j, for `rows` rows and GROUP columns, or fewer: those past `columns`
   repeat. */
INLINE void dots(const int rows, const struct gemm *g, size_t i, size_t j, size_t columns)
{
    const real *b[GROUP];
    vec sums[GROUP][GROUP];
    UNROLL
    for (size_t l = 0; l < GROUP; l++) {
        b[l] = g->b + (j + least(l, columns - 1)) * g->b_col;
        UNROLL
        for (int r = 0; r < rows; r++)
            sums[r][l] = all(0);
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
                sums[r][l] += x[r] * y;
        }
    }
    for (int r = 0; r < rows; r++)
        for (size_t l = 0; l < columns; l++)
            g->c[(i + r) * g->c_row + j + l] = sum(sums[r][l]) + (g->bias ? g->bias[j + l] : 0);
}

/* Columns of b contiguous, as in the tied head. */
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
    const struct gemm *g = args;
    if (g->packed || (g->M <= FEW && g->K && g->a_col == 1 && g->b_col == 1)) {
        const size_t pieces = up(g->M, FEW_ROWS) / FEW_ROWS, rows = least(g->M, FEW_ROWS);
        parallel(panels_by_tiles, g, up(g->N, COLS) / COLS * pieces, 1 + 65536 / (g->K * COLS * rows + 1));
        return;
    }
    if (g->M <= FEW && g->K && g->a_col == 1 && g->b_row == 1) {
        parallel(few_rows_by_dots, g, up(g->N, GROUP) / GROUP, 1 + 65536 / (g->K * GROUP));
        return;
    }
    const size_t row_tiles = (g->M + ROWS - 1) / ROWS, row_blocks = (g->M + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const size_t wanted = 4 * thread_count();
    const size_t blocks = (g->K + DEPTH - 1) / DEPTH, depth = blocks ? (g->K + blocks - 1) / blocks : 0;
    real *packed_b = scratch(SCRATCH_SHARED, (WIDTH + COLS) * (depth + 1) * sizeof(real));
    struct block t = {.g = g, .packed_b = packed_b};
    if (!g->K && g->M) /* an empty sum */
        for (size_t i = 0; i < g->M; i++)
            for (size_t j = 0; j < g->N; j++)
                g->c[i * g->c_row + j] = g->bias ? g->bias[j] : 0;
    for (t.col_begin = 0; t.col_begin < g->N && g->M; t.col_begin += WIDTH)
        for (t.depth_begin = 0; t.depth_begin < g->K; t.depth_begin += depth) {
            t.cols = least(g->N - t.col_begin, WIDTH);
            t.depth = least(g->K - t.depth_begin, depth);
            size_t panels = (t.cols + COLS - 1) / COLS;
            t.row_pieces = row_tiles < wanted ? row_tiles : row_blocks > wanted ? row_blocks : wanted;
            t.col_pieces = (wanted + t.row_pieces - 1) / t.row_pieces; /* few rows: share the columns too */
            t.col_pieces = least(t.col_pieces, panels);
            parallel(pack_b, &t, panels, 1 + 16384 / (t.depth * COLS));
            parallel(multiply, &t, t.row_pieces * t.col_pieces, 1);
        }
}

/* A column at a time would jump; a range of columns, row by row, keeps its sums in the cache. */
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
