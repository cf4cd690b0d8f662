//! Each rule alone as a table, and the bounds under random demands.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::spans::tests::Table;

/// 64 spans of 1000 compressed and 1 MiB uncompressed bytes.
const SPAN: u64 = 1 << 20;

fn read_ahead(rules: Rules) -> ReadAhead {
    ReadAhead::new(rules, Arc::new(Table::even(64, 1000, SPAN)))
}

fn roomy() -> Rules {
    Rules { first_unread: u64::MAX, max_unread: u64::MAX, ..Rules::none() }
}

/// Demands one after another, each with the spans that are guessed with it.
#[track_caller]
fn check(rules: Rules, demands: &[(Range<u64>, Option<FileHint>, &[u32])]) {
    let mut state = read_ahead(rules);
    for (range, file, expected) in demands {
        assert_eq!(state.on_demand(range.clone(), file.clone()), *expected, "at {range:?}");
    }
}

fn bytes(spans: Range<u64>) -> Range<u64> {
    spans.start * SPAN..spans.end * SPAN
}

fn at(span: u64) -> Range<u64> {
    span * SPAN + 1..span * SPAN + 4097
}

fn file(file: Range<u64>, directory: Range<u64>) -> Option<FileHint> {
    Some(FileHint { file, directory })
}

#[test]
fn without_rules_nothing_is_guessed() {
    let hint = file(bytes(3..9), bytes(0..64));
    check(Rules::none(), &[(at(3), hint.clone(), &[]), (at(4), hint, &[])]);
    check(roomy(), &[(at(3), None, &[]), (at(4), None, &[]), (at(5), None, &[])]);
}

#[test]
fn a_small_layer_is_wanted_whole_at_once_and_only_once() {
    let rules = |most| Rules { whole_small_layers: Some(most), ..Rules::none() };
    let all: Vec<u32> = (0..64).collect();
    let mut state = read_ahead(rules(64_000));
    assert_eq!(state.on_mount(), all);
    assert_eq!(state.on_mount(), [0; 0]);
    assert_eq!(state.unread_bytes(), 0);
    assert_eq!(read_ahead(rules(63_999)).on_mount(), [0; 0]);
    let mut state = read_ahead(rules(64_000));
    let rest: Vec<u32> = (0..64).filter(|span| *span != 5).collect();
    assert_eq!(state.on_demand(at(5), None), rest, "a demand does it, too");
}

#[test]
fn an_ascending_reader_gets_ever_longer_windows() {
    let rules = Rules { sequential: true, first_window: 2 * SPAN, max_window: 8 * SPAN, ..roomy() };
    check(
        rules.clone(),
        &[
            (bytes(10..11), None, &[]),
            // The window is 2, then 4 when half of it is read, then 8, and stays so.
            (bytes(11..12), None, &[12, 13]),
            (bytes(12..13), None, &[14, 15, 16]),
            (bytes(13..14), None, &[]),
            (bytes(14..15), None, &[17, 18, 19, 20, 21, 22]),
            (bytes(15..18), None, &[]),
            (bytes(18..19), None, &[23, 24, 25, 26]),
        ],
    );
    // Neither backwards nor by leaps.
    check(
        rules,
        &[(bytes(30..31), None, &[]), (bytes(20..21), None, &[]), (bytes(40..41), None, &[])],
    );
}

#[test]
fn ascending_readers_do_not_disturb_each_other() {
    let rules = Rules { sequential: true, first_window: SPAN, max_window: SPAN, ..roomy() };
    check(
        rules,
        &[
            (bytes(10..11), None, &[]),
            (bytes(40..41), None, &[]),
            (bytes(11..12), None, &[12]),
            (bytes(41..42), None, &[42]),
        ],
    );
}

#[test]
fn a_window_ends_with_the_layer() {
    let rules = Rules { sequential: true, first_window: u64::MAX, max_window: u64::MAX, ..roomy() };
    check(rules, &[(bytes(61..62), None, &[]), (bytes(62..63), None, &[63])]);
}

#[test]
fn a_reader_who_finds_what_was_guessed_is_followed_and_the_guess_was_right() {
    let rules = Rules { sequential: true, first_window: 2 * SPAN, max_window: 8 * SPAN, ..roomy() };
    let mut state = read_ahead(Rules { max_unread: 3000, ..rules });
    assert_eq!(state.on_demand(bytes(10..11), None), [0; 0]);
    assert_eq!(state.on_demand(bytes(11..12), None), [12, 13]);
    assert_eq!(state.unread_bytes(), 2000);
    // There is room for three: each that was read makes room for another.
    assert_eq!(state.on_hit(&bytes(12..13)), [14, 15]);
    assert_eq!(state.unread_bytes(), 3000);
    assert_eq!(state.on_hit(&bytes(13..15)), [16, 17]);
    assert_eq!(state.on_hit(&bytes(30..31)), [0; 0], "no reader ascends there");
}

#[test]
fn each_demand_in_a_large_file_wants_twice_as_much_around_it() {
    let rules = Rules { large_files: Some(2 * SPAN), max_window: 8 * SPAN, ..roomy() };
    let hint = || file(bytes(10..50), bytes(0..64));
    check(
        rules.clone(),
        &[
            (at(30), hint(), &[]),
            (at(20), hint(), &[21, 22, 23, 19]),
            (at(40), hint(), &[41, 42, 43, 44, 45, 46, 38, 39]),
            (at(49), hint(), &[47, 48]),
            // Not beyond the file, and each file by itself.
            (at(11), hint(), &[12, 13, 14, 15, 16, 17, 10]),
            (at(5), file(bytes(5..7), bytes(0..64)), &[]),
        ],
    );
    let small = Rules { whole_small_files: Some(40 * SPAN), ..rules };
    check(small, &[(at(12), file(bytes(10..14), bytes(0..64)), &[10, 11, 13])]);
}

#[test]
fn no_guess_reaches_farther_than_it_may() {
    let rules = Rules {
        first_unread: u64::MAX,
        max_unread: u64::MAX,
        max_directory: 64 * SPAN,
        ..Rules::default()
    };
    let rules = Rules { whole_small_files: None, neighbours: 0, ..rules };
    let mut state = read_ahead(Rules { whole_small_layers: None, ..rules });
    state.set_reach(4 * SPAN);
    let hint = || file(bytes(10..50), bytes(8..52));
    assert_eq!(state.on_demand(at(30), hint()), [0; 0]);
    assert_eq!(state.on_demand(at(20), hint()), [21, 19]);
    assert_eq!(state.on_demand(at(40), hint()), [41, 42, 43, 39]);
    assert_eq!(state.on_demand(at(12), hint()), [13, 14, 15, 11]);
}

#[test]
fn a_small_file_is_wanted_whole() {
    let rules = Rules { whole_small_files: Some(4 * SPAN), ..roomy() };
    let directory = bytes(0..64);
    check(
        rules,
        &[
            (at(7), file(bytes(5..9), directory.clone()), &[5, 6, 8]),
            (at(8), file(bytes(5..9), directory.clone()), &[]),
            (at(22), file(bytes(20..25), directory), &[]),
        ],
    );
}

#[test]
fn neighbours_come_along() {
    let rules = Rules { neighbours: 2, ..roomy() };
    check(rules, &[(at(3), None, &[4, 5]), (at(5), None, &[6, 7]), (at(62), None, &[63])]);
}

#[test]
fn the_second_demand_in_a_directory_wants_it_all() {
    let rules = Rules { directory: true, max_directory: 6 * SPAN, ..roomy() };
    let package = bytes(10..16);
    check(
        rules.clone(),
        &[
            (at(12), file(bytes(12..13), package.clone()), &[]),
            (at(13), file(bytes(13..14), package.clone()), &[14, 15, 10, 11]),
            (at(14), file(bytes(14..15), package), &[]),
        ],
    );
    let too_long = bytes(10..17);
    check(
        rules,
        &[
            (at(12), file(bytes(12..13), too_long.clone()), &[]),
            (at(13), file(bytes(13..14), too_long), &[]),
        ],
    );
}

#[test]
fn what_was_guessed_in_vain_bounds_the_guesses() {
    let rules = Rules { neighbours: 10, max_unread: 3000, ..roomy() };
    let mut state = read_ahead(rules);
    assert_eq!(state.on_demand(at(0), None), [1, 2, 3]);
    assert_eq!(state.unread_bytes(), 3000);
    assert_eq!(state.on_demand(at(20), None), [0; 0]);
    // What is read was no waste.
    assert_eq!(state.on_demand(at(2), None), [4]);
    state.forget([1]);
    assert_eq!(state.unread_bytes(), 2000);
    assert_eq!(state.on_demand(at(0), None), [1]);
}

#[test]
fn what_is_read_allows_as_much_to_be_guessed_in_vain() {
    let rules = Rules { neighbours: 10, first_unread: 1000, max_unread: 3000, ..Rules::none() };
    check(
        rules,
        &[
            (at(0), None, &[1, 2]),
            (at(20), None, &[21]),
            // No more than the bound.
            (at(40), None, &[]),
            (at(1), None, &[3]),
        ],
    );
}

#[test]
fn hostile_hints_and_ranges_are_harmless() {
    let mut state = read_ahead(Rules::default());
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is tried")]
    let backwards = FileHint { file: 9..3, directory: u64::MAX..0 };
    state.on_demand(0..u64::MAX, Some(backwards.clone()));
    assert_eq!(state.on_demand(u64::MAX..u64::MAX, Some(backwards)), [0; 0]);
    state.forget([u32::MAX]);
    let mut empty = ReadAhead::new(Rules::default(), Arc::new(Table::new(&[])));
    assert_eq!(empty.on_mount(), [0; 0]);
    assert_eq!(empty.on_demand(0..10, None), [0; 0]);
}

proptest! {
    #[test]
    fn guesses_are_new_and_within_bounds(
        demands in prop::collection::vec((0_u64..70 * SPAN, 1_u64..3 * SPAN, any::<bool>()), 1..80),
        max_unread in 0_u64..40_000,
        neighbours in 0_u32..4,
    ) {
        let rules = Rules { whole_small_layers: None, max_unread, neighbours, ..Rules::default() };
        let mut state = read_ahead(rules);
        let mut seen = BTreeSet::new();
        let mut unread = BTreeSet::new();
        for (start, length, hinted) in demands {
            let range = start..start + length;
            let hint = hinted.then(|| FileHint {
                file: start..start + 2 * length,
                directory: start.saturating_sub(length)..start + 4 * length,
            });
            let guesses = state.on_demand(range.clone(), hint);
            for span in covering(&Table::even(64, 1000, SPAN), &range) {
                seen.insert(span);
                unread.remove(&span);
            }
            for span in guesses {
                prop_assert!(span < 64);
                prop_assert!(seen.insert(span), "span {} was asked for before", span);
                unread.insert(span);
            }
            prop_assert_eq!(state.unread_bytes(), unread.len() as u64 * 1000);
            prop_assert!(state.unread_bytes() <= max_unread);
        }
    }
}
