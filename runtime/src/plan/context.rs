//! The context: KV cache, recurrent state, buffers to calculate in, logits, and the tokenizer.
//!
//! Source: llama.cpp src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-memory-recurrent.cpp,
//! llama-context.cpp (output_reserve, sched_reserve), ggml/src/ggml-cpu/ggml-cpu.c (ggml_graph_plan).

use super::{Row, Settings};
use crate::model::{GgmlType, Header, Layer};

/// llama.cpp rounds the cells of a cache up to a multiple of this.
const CELLS: u64 = 256;
/// Position, sequences and the like of one cell (llama-kv-cells.h).
const CELL: u64 = 64;
/// Code, libraries, heap and threads of a worker; measured.
const WORKER: u64 = 14 << 20;
/// What llama.cpp keeps of a node of the graph: its tensor in three graphs, its places in the scheduler's tables.
const NODE: u64 = 2048;
/// Text, score, attributes, hash entry and piece of one token, and of one merge; measured.
const TOKEN: u64 = 220;
const MERGE: u64 = 170;

pub(super) fn rows(header: &Header, settings: &Settings) -> Vec<Row> {
    let cells = cells(settings.n_ctx.into());
    let layers = &header.layers.layers;
    let (mut all, mut sliding, mut recurrent) = (Sum::default(), Sum::default(), Sum::default());
    let mut widest_window = 0;
    for layer in layers {
        let token = |elements: u64, kind: GgmlType| kind.bytes(elements);
        let width =
            token(layer.k, settings.cache_type_k).saturating_add(token(layer.v, settings.cache_type_v));
        match layer.window {
            Some(window) => {
                widest_window = widest_window.max(window);
                sliding.add(width.saturating_mul(window_cells(window, cells, settings)));
            }
            None if width > 0 => all.add(width.saturating_mul(cells)),
            None => {}
        }
        if layer.recurrent > 0 {
            recurrent.add(
                layer
                    .recurrent
                    .saturating_mul(4)
                    .saturating_mul(settings.sequences.into()),
            );
        }
    }
    let sliding_cells = if sliding.count > 0 {
        window_cells(widest_window, cells, settings)
    } else {
        0
    };
    let all_cells = if all.count > 0 { cells } else { 0 };
    vec![
        Row {
            what: "KV cache",
            bytes: all.bytes.saturating_add(all_cells.saturating_mul(CELL)),
            how: format!("{} layers, {cells} tokens", all.count),
        },
        Row {
            what: "KV cache, sliding",
            bytes: sliding.bytes.saturating_add(sliding_cells.saturating_mul(CELL)),
            how: format!(
                "{} layers, {sliding_cells} tokens: a window of {widest_window} a sequence",
                sliding.count
            ),
        },
        Row {
            what: "recurrent state",
            bytes: recurrent.bytes,
            how: format!("{} layers, {} sequences", recurrent.count, settings.sequences),
        },
        Row {
            what: "compute buffers",
            bytes: compute(header, settings, all_cells.saturating_add(sliding_cells)),
            how: format!(
                "{} tokens in one go, {} threads",
                settings.n_ubatch, settings.threads
            ),
        },
        Row {
            what: "logits",
            bytes: logits(header, settings),
            how: format!(
                "{} tokens of vocabulary, {} sequences, {} slots",
                header.vocabulary, settings.sequences, settings.slots
            ),
        },
        Row {
            what: "tokenizer",
            bytes: header
                .vocabulary
                .saturating_mul(TOKEN)
                .saturating_add(header.merges.saturating_mul(MERGE)),
            how: format!("{} tokens, {} merges", header.vocabulary, header.merges),
        },
        Row {
            what: "worker",
            bytes: WORKER,
            how: "program and threads".to_owned(),
        },
    ]
}

#[derive(Default)]
struct Sum {
    bytes: u64,
    count: usize,
}

impl Sum {
    fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.count += 1;
    }
}

fn cells(tokens: u64) -> u64 {
    tokens.max(1).checked_next_multiple_of(CELLS).unwrap_or(u64::MAX)
}

/// Cells of the cache of layers with a window: one window a sequence and one batch, never more than the others have.
fn window_cells(window: u64, cells_of_all: u64, settings: &Settings) -> u64 {
    let wanted = window
        .saturating_mul(settings.sequences.into())
        .saturating_add(settings.n_ubatch.into());
    cells(wanted.min(cells_of_all))
}

/// The largest graph: its nodes, activations of one batch in f32, masks over the caches in f16, and ggml's work buffer, which
/// holds the quantised activations of one multiplication and each thread's tiles of flash attention.
fn compute(header: &Header, settings: &Settings, masked_cells: u64) -> u64 {
    let tokens = u64::from(settings.n_ubatch.min(settings.n_ctx));
    let width = header.embedding;
    let (mut live, mut widest, mut head) = (0, width, 0);
    for Layer {
        k,
        v,
        heads,
        head: query,
        feed_forward,
        ..
    } in &header.layers.layers
    {
        let queries = heads.saturating_mul(*query);
        let attention = queries.saturating_mul(2).saturating_add(*k).saturating_add(*v);
        let part = attention.max(feed_forward.saturating_mul(2));
        live = live.max(part.saturating_add(width.saturating_mul(3)));
        widest = widest.max(queries).max(*feed_forward);
        head = head.max(*query);
    }
    let activations = tokens.saturating_mul(live).saturating_mul(4);
    let masks = tokens.saturating_mul(masked_cells).saturating_mul(2);
    // A row of Q8_0 or Q8_K, the types that activations are quantised to: at most 292 bytes for 256 elements.
    let quantised = tokens.saturating_mul(widest).saturating_mul(292) / 256;
    // GGML_FA_TILE_Q and GGML_FA_TILE_KV are 64.
    let tile = head
        .saturating_mul(4 * 64)
        .saturating_add(2 * 64 * 64)
        .saturating_mul(4);
    let tiles = tile.saturating_mul(settings.threads.into());
    // llama_context::graph_max_nodes: the graph's own memory is zeroed, so all of it is resident.
    let nodes = (header.tensors.len() as u64).saturating_mul(8).max(1024);
    let graph = nodes.saturating_mul(NODE);
    [activations, masks, quantised, tiles, graph]
        .into_iter()
        .fold(0, u64::saturating_add)
}

/// One row of logits in the graph for each slot, one in the output buffer for each sequence, and the candidates (token,
/// logit, probability) of the sampler that is at work; llama.cpp keeps a list of all tokens besides.
fn logits(header: &Header, settings: &Settings) -> u64 {
    let (slots, sequences) = (u64::from(settings.slots), u64::from(settings.sequences));
    let for_each_token = sequences
        .saturating_mul(4)
        .saturating_add(slots.saturating_mul(4))
        .saturating_add(12 + 4);
    header.vocabulary.saturating_mul(for_each_token)
}
