//! Plans of models that are not there.

use super::*;
use crate::model::tests::{Item, header};
use crate::model::{Layer, Tensor};

const NONE: fn(&str) -> bool = |_| false;

fn settings(n_ctx: u32) -> Settings {
    Settings {
        n_ctx,
        slots: 1,
        sequences: 1,
        n_ubatch: 512,
        threads: 1,
        cache_type_k: GgmlType::F16,
        cache_type_v: GgmlType::F16,
        prefixes: 0,
        journal: 0,
        repack: Repack::of(NONE),
    }
}

/// Of any header, however odd: it must not panic, and neither must the advice.
pub(crate) fn plan_of(header: &Header) {
    let plan = Plan::of(header, &settings(4096));
    assert!(plan.bytes() >= plan.worker_bytes());
    let nothing = Available {
        bytes: 1,
        by: "a test".to_owned(),
    };
    assert!(plan.check(Some(&nothing)).is_err());
}

fn bytes(plan: &Plan, what: &str) -> u64 {
    plan.worker
        .iter()
        .filter(|row| row.what == what)
        .map(|row| row.bytes)
        .sum()
}

#[test]
fn the_kv_cache_by_hand() {
    let header = header(&[]);
    // 2 layers · (32 + 32) elements · 2 bytes · 512 tokens, and 64 bytes a cell.
    let plan = Plan::of(&header, &settings(512));
    assert_eq!(bytes(&plan, "KV cache"), 2 * 64 * 2 * 512 + 64 * 512);
    // 300 tokens are padded to 512.
    assert_eq!(
        bytes(&Plan::of(&header, &settings(300)), "KV cache"),
        bytes(&plan, "KV cache")
    );
    // A block of q8_0 has 34 bytes for 32 elements.
    let quantised = Settings {
        cache_type_k: GgmlType(8),
        cache_type_v: GgmlType(8),
        ..settings(512)
    };
    assert_eq!(
        bytes(&Plan::of(&header, &quantised), "KV cache"),
        2 * 2 * 34 * 512 + 64 * 512
    );
}

#[test]
fn a_window_is_one_for_each_sequence() {
    let mut header = header(&[]);
    let layer = Layer {
        k: 64,
        v: 64,
        window: Some(512),
        ..Layer::default()
    };
    header.layers.layers = vec![layer];
    let sliding = |n_ctx, sequences| {
        let settings = Settings {
            sequences,
            ..settings(n_ctx)
        };
        bytes(&Plan::of(&header, &settings), "KV cache, sliding")
    };
    let cell = 128 * 2 + 64;
    assert_eq!(sliding(8192, 1), (512 + 512) * cell);
    assert_eq!(sliding(8192, 3), (3 * 512 + 512) * cell);
    // Never more than a layer without a window has.
    assert_eq!(sliding(8192, 100), 8192 * cell);
    assert_eq!(sliding(512, 1), 512 * cell);
}

#[test]
fn ggml_copies_what_its_kernels_want_in_another_order() {
    let tensor = |name: &str, kind: u32, shape: [u64; 4]| Tensor {
        name: name.to_owned(),
        kind: GgmlType(kind),
        shape,
        bytes: 1000,
    };
    let mut header = header(&[]);
    header.tensors = vec![
        tensor("token_embd.weight", 2, [64, 96, 1, 1]),
        tensor("blk.0.attn_q.weight", 2, [64, 64, 1, 1]),
        tensor("blk.0.attn_k.weight", 3, [64, 64, 1, 1]),
        tensor("blk.0.attn_v.weight", 8, [64, 64, 1, 1]),
        tensor("blk.0.ffn_up_exps.weight", 12, [256, 64, 8, 1]),
        tensor("blk.0.attn_norm.weight", 0, [64, 1, 1, 1]),
    ];
    let avx2 = Repack::of(|name| matches!(name, "__AVX2__" | "GGML_USE_CPU_REPACK"));
    let weights = |header: &Header, repack| {
        let plan = Plan::of(
            header,
            &Settings {
                repack,
                ..settings(512)
            },
        );
        (
            bytes(&plan, "weights"),
            bytes(&plan, "copied weights"),
            plan.read_once,
        )
    };
    assert_eq!(weights(&header, Repack::of(NONE)), (6000, 0, 0));
    assert_eq!(
        weights(&header, Repack::of(|name| name == "__AVX2__")),
        (6000, 0, 0),
        "without ggml's option"
    );
    // Q4_0 and the experts' Q4_K; and the embeddings a second time, because they are the output, too.
    assert_eq!(weights(&header, avx2), (4000, 3000, 2000));
    header.tensors.push(tensor("output.weight", 14, [64, 96, 1, 1]));
    assert_eq!(weights(&header, avx2), (5000, 2000, 2000));
    // ARM's kernels take Q8_0 and Q6_K as well.
    let dotprod = Repack::of(|name| matches!(name, "__ARM_FEATURE_DOTPROD" | "GGML_USE_CPU_REPACK"));
    assert_eq!(weights(&header, dotprod), (3000, 4000, 4000));
}

fn advised(header: &Header, settings: &Settings, available: u64) -> String {
    let available = Available {
        bytes: available,
        by: "a test".to_owned(),
    };
    match Plan::of(header, settings).check(Some(&available)) {
        Err(PlanError::TooLarge { hint, table, .. }) => {
            assert!(table.contains("KV cache") && table.contains("sum"), "{table}");
            hint
        }
        other => panic!("{other:?}"),
    }
}

/// Every suggestion is one that the plan itself accepts, and the next larger context is not.
#[test]
fn what_is_advised_fits() {
    let header = header(&[
        ("llama.block_count", Item::U32(32)),
        ("llama.embedding_length", Item::U32(2048)),
        ("llama.attention.head_count", Item::U32(32)),
        ("llama.attention.head_count_kv", Item::U32(32)),
    ]);
    let wanted = settings(8192);
    let limit = Plan::of(&header, &settings(2048)).bytes();
    let hint = advised(&header, &wanted, limit);
    assert!(hint.contains("n_ctx = 2048 "), "{hint}");
    assert!(!hint.contains("q8_0"), "{hint}");
    let almost = Plan::of(&header, &wanted).bytes() - 1;
    let hint = advised(&header, &wanted, almost);
    assert!(hint.contains("n_ctx = 7936 ") && hint.contains("q8_0"), "{hint}");
    assert!(advised(&header, &wanted, 1000).starts_with("no setting"));
    assert_eq!(Plan::of(&header, &wanted).check(None), Ok(()));
}

#[test]
fn fewer_slots_are_advised_where_they_suffice() {
    let mut header = header(&[]);
    header.vocabulary = 262_144;
    let wanted = Settings {
        slots: 8,
        sequences: 8,
        ..settings(512)
    };
    let limit = Plan::of(
        &header,
        &Settings {
            slots: 3,
            sequences: 3,
            ..wanted.clone()
        },
    )
    .bytes();
    let hint = advised(&header, &wanted, limit);
    assert!(hint.contains("slots = 3"), "{hint}");
}

#[test]
fn a_configuration_becomes_settings() {
    let mut config = Config::default();
    let of = Settings::of(&config).unwrap();
    assert_eq!((of.n_ctx, of.slots, of.cache_type_k), (2048, 8, GgmlType::F16));
    "q9_0".clone_into(&mut config.model.cache_type_v);
    let error = Settings::of(&config).unwrap_err().to_string();
    assert!(
        error.contains("model.cache_type_v") && error.contains("`q9_0`"),
        "{error}"
    );
}

#[test]
fn fewer_kept_beginnings_are_advised_where_that_suffices() {
    let header = header(&[]);
    let wanted = Settings {
        prefixes: 64 << 20,
        ..settings(512)
    };
    let all = Plan::of(&header, &wanted).bytes();
    assert_eq!(all - Plan::of(&header, &settings(512)).bytes(), 64 << 20);
    let hint = advised(&header, &wanted, all - (10 << 20));
    assert!(
        hint.contains(&format!("[prefix] ram_bytes = {}", 54 << 20)),
        "{hint}"
    );
    let hint = advised(
        &header,
        &Settings { slots: 2, ..wanted },
        Plan::of(&header, &settings(512)).bytes() - 1,
    );
    assert!(!hint.contains("ram_bytes = 5"), "{hint}");
}
