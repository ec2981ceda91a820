use proptest::prelude::*;

use super::*;

/// Ids from a seed, so that sequences with the same one begin alike.
fn tokens(seed: i32, count: usize) -> Vec<LlamaToken> {
    (0..count as i32)
        .map(|at| LlamaToken(seed * 10_000 + at))
        .collect()
}

fn piece(tokens: &[LlamaToken], proven: bool) -> Piece {
    Piece {
        tokens: tokens.to_vec(),
        // Ten bytes a token with the token's own four.
        state: State::trusted(vec![0; tokens.len() * 6]),
        divisible: true,
        proven,
    }
}

/// Keeps `tokens` as the scheduler does; returns whether all of them are kept.
fn keep(
    prefixes: &mut Prefixes,
    adapter: Option<&str>,
    tokens: &[LlamaToken],
    marks: &[usize],
    shared: usize,
) -> bool {
    let mut end = prefixes.end(adapter, tokens);
    for cut in prefixes.cuts(end.position..tokens.len(), marks) {
        let piece = piece(&tokens[end.position..cut], cut <= shared);
        match prefixes.add(end, adapter, piece) {
            Some(next) => end = next,
            None => return false,
        }
    }
    true
}

#[test]
fn what_prompts_begin_with_is_kept_once() {
    let mut prefixes = Prefixes::new(100_000, false);
    let (system, first, second) = (tokens(1, 100), tokens(2, 40), tokens(3, 60));
    let one = [&system[..], &first].concat();
    let other = [&system[..], &second].concat();
    assert!(keep(&mut prefixes, None, &one, &[100], 0));
    assert!(keep(&mut prefixes, None, &other, &[100, 100], 100));
    assert_eq!((prefixes.parts.len(), prefixes.bytes()), (3, 2000));
    let found = prefixes.find(None, &other);
    assert_eq!((found.parts.len(), found.count), (2, 160));
    // The beginning of a tail is of use, a few tokens alone are not.
    assert_eq!(prefixes.find(None, &other[..130]).count, 130);
    assert_eq!(prefixes.find(None, &other[..110]).count, 110);
    assert_eq!(prefixes.find(None, &other[..15]).count, 0);
    assert_eq!(prefixes.find(None, &tokens(4, 100)), Found::default());
    assert_eq!(prefixes.find(Some("a"), &one), Found::default());
    // What is there is not kept again.
    assert!(keep(&mut prefixes, None, &one, &[100], 0));
    assert!(keep(&mut prefixes, None, &one[..60], &[], 0));
    assert_eq!(prefixes.bytes(), 2000);
    assert_eq!(prefixes.likest(None, &[&system[..50], &first].concat()), 50);
}

#[test]
fn parts_end_at_marks_and_are_neither_short_nor_long() {
    let prefixes = Prefixes::new(1000, false);
    assert_eq!(prefixes.cuts(0..15, &[]), [0; 0]);
    assert_eq!(prefixes.cuts(0..16, &[0, 8, 16, 20]), [16]);
    assert_eq!(prefixes.cuts(0..100, &[95, 30, 40, 10]), [30, 100]);
    assert_eq!(prefixes.cuts(0..600, &[300]), [256, 300, 556, 600]);
    assert_eq!(prefixes.cuts(10..530, &[]), [266, 514, 530]);
    assert_eq!(Prefixes::new(1000, true).cuts(0..600, &[300]), [600]);
}

#[test]
fn what_was_of_use_stays_and_tails_go_before_what_they_follow() {
    let mut prefixes = Prefixes::new(4000, false);
    let system = tokens(1, 100);
    let ask = |seed| [&system[..], &tokens(seed, 50)].concat();
    assert!(keep(&mut prefixes, None, &ask(2), &[100], 0));
    prefixes.touch(&prefixes.find(None, &ask(3)));
    for seed in 3..20 {
        assert!(keep(&mut prefixes, None, &ask(seed), &[100], 100));
        assert!(prefixes.bytes() <= 4000);
    }
    assert_eq!(
        prefixes.find(None, &ask(2)).count,
        100,
        "the oldest tail has gone"
    );
    assert_eq!(prefixes.find(None, &ask(19)).count, 150);
    // A long one that nobody has asked for twice: its beginning is kept, in place of tails, and what is proven stays.
    assert!(!keep(&mut prefixes, None, &tokens(30, 1000), &[], 0));
    assert_eq!(prefixes.find(None, &tokens(30, 1000)).count, 256);
    assert_eq!(prefixes.find(None, &ask(2)).count, 100);
    // Nothing fits into nothing.
    assert!(!keep(&mut Prefixes::new(0, false), None, &system, &[], 0));
}

#[test]
fn what_was_proven_long_ago_goes() {
    let mut prefixes = Prefixes::new(4000, false);
    for seed in 0..10 {
        let prompt = tokens(seed, 100);
        assert!(keep(&mut prefixes, None, &prompt, &[], 0), "{seed}");
        prefixes.touch(&prefixes.find(None, &prompt));
    }
    assert_eq!(prefixes.find(None, &tokens(0, 100)).count, 0);
    assert_eq!(prefixes.find(None, &tokens(9, 100)).count, 100);
}

#[test]
fn whole_sequences_where_nothing_else_is_of_use() {
    let mut prefixes = Prefixes::new(100_000, true);
    let long = tokens(1, 600);
    let add = |prefixes: &mut Prefixes, tokens: &[LlamaToken], divisible| {
        let end = prefixes.end(None, tokens);
        assert_eq!(end.position, 0);
        let piece = Piece {
            divisible,
            ..piece(tokens, false)
        };
        assert!(prefixes.add(end, None, piece).is_some());
    };
    add(&mut prefixes, &long, false);
    add(&mut prefixes, &long[..200], false);
    assert_eq!(prefixes.find(None, &long[..599]).count, 200);
    assert_eq!(prefixes.find(None, &long).count, 600);
    assert_eq!(prefixes.find(None, &long).parts.len(), 1);
    assert_eq!(prefixes.end(None, &long).position, 600);
    assert_eq!(prefixes.likest(None, &long[..599]), 599);
    // One that is shorter than the window.
    add(&mut prefixes, &tokens(2, 100), true);
    assert_eq!(prefixes.find(None, &tokens(2, 60)).count, 60);
}

proptest! {
    /// Whatever was kept: what is found is a beginning, its parts follow each other without a gap, and no more is kept
    /// than there may be.
    #[test]
    fn a_chain_has_no_gap(prompts in proptest::collection::vec(proptest::collection::vec(0..2_i32, 1..6), 1..30), most in 0..8000_u64) {
        let mut prefixes = Prefixes::new(most, false);
        let prompt = |blocks: &[i32]| -> Vec<LlamaToken> {
            blocks.iter().enumerate().flat_map(|(at, &block)| tokens(2 * at as i32 + block, 30)).collect()
        };
        for (at, blocks) in prompts.iter().enumerate() {
            let wanted = prompt(blocks);
            let found = prefixes.find(None, &wanted);
            prefixes.touch(&found);
            keep(&mut prefixes, None, &wanted, &[found.count, 30], if at % 3 == 0 { found.count } else { 0 });
            prop_assert!(prefixes.bytes() <= most);
            let found = prefixes.find(None, &wanted);
            let mut position = 0;
            for &id in &found.parts {
                let part = prefixes.part(id).unwrap();
                prop_assert_eq!(part.range().start, position);
                let end = part.range().end.min(found.count);
                prop_assert_eq!(&part.piece.tokens[..end - position], &wanted[position..end]);
                position = end;
            }
            prop_assert_eq!(position, found.count);
            for part in &prefixes.parts {
                prop_assert!(part.parent.is_none_or(|parent| prefixes.part(parent).is_some()));
            }
        }
    }
}
