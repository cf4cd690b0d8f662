//! The order of the queue as tables, and its promises under random use.

use proptest::prelude::*;

use super::*;
use crate::spans::tests::Table;

use Class::{Background, Demand, Prefetch, ReadAhead};

const LIMITS: Limits = Limits {
    max_connections: 4,
    demand_connections: 1,
    background_connections: 2,
    demand_bytes: 300,
    read_ahead_bytes: 500,
    background_bytes: 500,
    idle_bytes: u64::MAX,
    completion_bytes: u64::MAX,
    memory_bytes: u64::MAX,
    max_gap: 0,
    speculative_percent: 50,
    speculative_bytes: 0,
};

const IDLE: InFlight = InFlight {
    demand: 0,
    read_ahead: 0,
    background: 0,
    demand_bytes: 0,
    speculative_bytes: 0,
    background_bytes: 0,
};

/// A queue with layer 0 of ten spans and layer 1 of five, 100 compressed bytes each.
fn queue(wanted: &[(u32, u32, Class)]) -> Queue {
    let mut queue = Queue::new();
    queue.add_layer(LayerId(0), Arc::new(Table::even(10, 100, 1000)));
    queue.add_layer(LayerId(1), Arc::new(Table::even(5, 100, 1000)));
    for &(layer, span, class) in wanted {
        queue.want(LayerId(layer), span, class);
    }
    queue
}

/// What the queue hands out one after another, with nothing else in flight.
fn drain(queue: &mut Queue, limits: &Limits) -> Vec<(u32, Range<u32>, Class)> {
    std::iter::from_fn(|| queue.next(&IDLE, limits))
        .map(|job| (job.layer.0, job.spans, job.class))
        .collect()
}

#[track_caller]
fn check(wanted: &[(u32, u32, Class)], expected: &[(u32, Range<u32>, Class)]) {
    let mut queue = queue(wanted);
    assert_eq!(drain(&mut queue, &LIMITS), expected);
    assert!(queue.is_empty());
}

#[test]
fn the_urgent_comes_first() {
    check(&[], &[]);
    check(
        &[(0, 0, Background), (0, 4, ReadAhead), (0, 8, Demand)],
        &[(0, 8..9, Demand), (0, 4..5, ReadAhead), (0, 0..1, Background)],
    );
}

#[test]
fn equal_demands_are_served_as_they_came() {
    check(
        &[(0, 8, Demand), (1, 2, Demand), (0, 0, Demand), (0, 4, Demand)],
        &[(0, 8..9, Demand), (1, 2..3, Demand), (0, 0..1, Demand), (0, 4..5, Demand)],
    );
}

#[test]
fn what_is_known_to_be_needed_comes_before_guesses_and_late_guesses_before_early_ones() {
    check(
        &[(0, 0, ReadAhead), (1, 4, ReadAhead), (0, 8, Prefetch), (1, 2, Prefetch)],
        &[(0, 8..9, Prefetch), (1, 2..3, Prefetch), (1, 4..5, ReadAhead), (0, 0..1, ReadAhead)],
    );
}

#[test]
fn neighbours_that_are_wanted_come_along() {
    check(
        &[(0, 3, ReadAhead), (0, 2, Demand), (0, 4, ReadAhead), (0, 5, Background)],
        &[(0, 2..5, Demand), (0, 5..6, Background)],
    );
    check(&[(0, 3, Background), (0, 2, Demand)], &[(0, 2..3, Demand), (0, 3..4, Background)]);
}

#[test]
fn nothing_less_urgent_is_fetched_before_what_a_reader_waits_for() {
    check(&[(0, 1, Background), (0, 2, Demand)], &[(0, 2..3, Demand), (0, 1..2, Background)]);
    check(&[(0, 2, Demand), (0, 1, Demand)], &[(0, 1..3, Demand)]);
    check(&[(0, 2, ReadAhead), (0, 1, ReadAhead)], &[(0, 1..3, ReadAhead)]);
}

#[test]
fn requests_that_nobody_waits_for_are_longer() {
    let all = |class| (0..10).map(|span| (0, span, class)).collect::<Vec<_>>();
    check(
        &all(Demand),
        &[(0, 0..3, Demand), (0, 3..6, Demand), (0, 6..9, Demand), (0, 9..10, Demand)],
    );
    check(&all(Background), &[(0, 0..5, Background), (0, 5..10, Background)]);
}

#[test]
fn small_layers_are_whole_first() {
    let mut wanted: Vec<_> = (0..10).map(|span| (0, span, Background)).collect();
    wanted.extend((0..5).map(|span| (1, span, Background)));
    check(&wanted, &[(1, 0..5, Background), (0, 0..5, Background), (0, 5..10, Background)]);
}

#[test]
fn completion_goes_on_behind_the_last_span_that_a_reader_waited_for() {
    let completion = [(1, 0), (0, 0), (0, 5), (0, 6), (0, 9)];
    let completion = completion.map(|(layer, span)| (layer, span, Background));
    check(
        &[&completion[..], &[(0, 4, Demand)]].concat(),
        &[
            (0, 4..5, Demand),
            (0, 5..7, Background),
            (0, 9..10, Background),
            (1, 0..1, Background),
            (0, 0..1, Background),
        ],
    );
}

#[test]
fn a_span_longer_than_a_request_is_fetched_alone() {
    let mut queue = queue(&[(0, 0, Demand), (0, 1, Demand)]);
    let limits = Limits { demand_bytes: 10, ..LIMITS };
    assert_eq!(drain(&mut queue, &limits), [(0, 0..1, Demand), (0, 1..2, Demand)]);
}

#[test]
fn small_gaps_are_bridged_and_belong_to_the_flight() {
    let mut queue = queue(&[(0, 0, Demand), (0, 2, Demand), (0, 9, Demand)]);
    let limits = Limits { max_gap: 100, ..LIMITS };
    let job = queue.next(&IDLE, &limits).unwrap();
    assert_eq!((job.spans, job.bytes), (0..3, 0..300));
    assert!(queue.is_in_flight(LayerId(0), 1));
    assert_eq!(queue.want(LayerId(0), 1, Background), Wanted::InFlight);
    queue.done(LayerId(0), 0..3, Outcome::Done);
    assert!(!queue.is_in_flight(LayerId(0), 1));
    assert_eq!(drain(&mut queue, &limits), [(0, 9..10, Demand)]);
}

#[test]
fn a_gap_that_is_in_flight_is_not_bridged() {
    let mut queue = queue(&[(0, 1, Demand)]);
    let limits = Limits { max_gap: 100, ..LIMITS };
    assert_eq!(drain(&mut queue, &limits), [(0, 1..2, Demand)]);
    queue.want(LayerId(0), 0, Demand);
    queue.want(LayerId(0), 2, Demand);
    assert_eq!(drain(&mut queue, &limits), [(0, 0..1, Demand), (0, 2..3, Demand)]);
}

#[test]
fn wanting_tells_what_it_changed() {
    let mut queue = queue(&[]);
    let id = LayerId(0);
    assert_eq!(queue.want(id, 3, Background), Wanted::Queued);
    assert_eq!(queue.want(id, 3, Background), Wanted::Already);
    assert_eq!(queue.want(id, 3, Demand), Wanted::Promoted);
    assert_eq!(queue.want(id, 3, ReadAhead), Wanted::Already);
    assert_eq!(queue.len(), 1);
    assert_eq!(drain(&mut queue, &LIMITS), [(0, 3..4, Demand)]);
    assert_eq!(queue.want(id, 3, Demand), Wanted::InFlight);
    assert_eq!(queue.want(id, 10, Demand), Wanted::Unknown);
    assert_eq!(queue.want(LayerId(9), 0, Demand), Wanted::Unknown);
}

#[test]
fn what_failed_waits_again_behind_the_others() {
    let mut queue = queue(&[(0, 3, Background)]);
    let id = LayerId(0);
    assert_eq!(drain(&mut queue, &LIMITS), [(0, 3..4, Background)]);
    queue.want(id, 3, Demand);
    queue.want(id, 7, Demand);
    queue.done(id, 3..4, Outcome::Again);
    // The reader that came during the flight counts.
    assert_eq!(drain(&mut queue, &LIMITS), [(0, 7..8, Demand), (0, 3..4, Demand)]);
    queue.unwant(id, 3);
    queue.done(id, 3..4, Outcome::Again);
    queue.done(id, 7..8, Outcome::Done);
    assert!(queue.is_empty(), "nobody wants it any more");
}

#[test]
fn what_completion_still_wants_is_counted() {
    let mut queue = queue(&[(0, 0, Background), (0, 1, Background), (1, 0, Background)]);
    assert_eq!(queue.background_bytes(), 300);
    queue.want(LayerId(0), 0, Background);
    queue.want(LayerId(0), 1, Demand);
    assert_eq!(queue.background_bytes(), 200);
    assert_eq!(queue.next(&IDLE, &LIMITS).unwrap().spans, 1..2);
    queue.unwant(LayerId(0), 0);
    assert_eq!(queue.background_bytes(), 100);
    assert_eq!(queue.next(&IDLE, &LIMITS).unwrap().class, Background);
    assert_eq!(queue.background_bytes(), 0);
    queue.done(LayerId(1), 0..1, Outcome::Again);
    assert_eq!(queue.background_bytes(), 100);
    queue.forget(LayerId(1));
    assert_eq!(queue.background_bytes(), 0);
}

#[test]
fn what_is_taken_back_is_not_handed_out() {
    let mut queue = queue(&[(0, 1, Demand), (0, 5, Demand), (1, 1, Demand)]);
    queue.unwant(LayerId(0), 1);
    queue.unwant(LayerId(0), 1);
    queue.forget(LayerId(1));
    assert_eq!(drain(&mut queue, &LIMITS), [(0, 5..6, Demand)]);
    queue.forget(LayerId(0));
    queue.done(LayerId(0), 5..6, Outcome::Again);
    assert!(queue.is_empty());
}

#[track_caller]
fn check_connections(class: Class, demand: u32, read_ahead: u32, background: u32, expected: bool) {
    let mut queue = queue(&[(0, 0, class)]);
    let now = InFlight { demand, read_ahead, background, ..IDLE };
    assert_eq!(queue.next(&now, &LIMITS).is_some(), expected, "{class:?} with {now:?}");
}

#[test]
fn connections_are_kept_for_the_urgent() {
    check_connections(Demand, 0, 1, 2, true);
    check_connections(Demand, 3, 0, 0, true);
    check_connections(Demand, 2, 1, 1, false);
    check_connections(ReadAhead, 0, 0, 2, true);
    check_connections(ReadAhead, 0, 1, 2, false);
    check_connections(Background, 0, 0, 1, true);
    check_connections(Background, 0, 0, 2, false);
    check_connections(Background, 2, 1, 0, false);
}

#[track_caller]
fn check_share(demand_bytes: u64, speculative_bytes: u64, expected: bool) {
    let mut queue = queue(&[(0, 0, ReadAhead)]);
    let now = InFlight { demand_bytes, speculative_bytes, ..IDLE };
    assert_eq!(queue.next(&now, &LIMITS).is_some(), expected, "{now:?}");
}

#[test]
fn while_a_reader_waits_speculation_keeps_to_its_share() {
    check_share(0, u64::MAX - 1, false);
    check_share(0, u64::MAX - 100, true);
    check_share(99, 0, false);
    check_share(100, 0, true);
    check_share(300, 200, true);
    check_share(300, 201, false);
    check_share(u64::MAX, u64::MAX - 100, true);
}

#[test]
fn speculation_is_cut_to_its_share_and_has_a_floor() {
    let all: Vec<_> = (0..10).rev().map(|span| (0, span, ReadAhead)).collect();
    let next = |limits: Limits, now: InFlight| queue(&all).next(&now, &limits).map(|job| job.spans);
    let reader = InFlight { demand_bytes: 250, ..IDLE };
    assert_eq!(next(LIMITS, reader), Some(0..2));
    assert_eq!(next(Limits { speculative_percent: 100, ..LIMITS }, reader), Some(0..5));
    assert_eq!(next(Limits { speculative_percent: 0, ..LIMITS }, reader), None);
    let floor = Limits { speculative_bytes: 400, ..LIMITS };
    assert_eq!(next(floor, reader), Some(0..4));
    assert_eq!(next(floor, InFlight { speculative_bytes: 250, ..reader }), Some(0..1));
    assert_eq!(next(floor, InFlight { speculative_bytes: 350, ..reader }), None);
}

#[test]
fn what_is_needed_soon_comes_over_many_connections() {
    let all: Vec<_> = (0..10).map(|span| (0, span, Prefetch)).collect();
    let limits = Limits { read_ahead_bytes: 200, ..LIMITS };
    let jobs: Vec<_> = drain(&mut queue(&all), &limits).into_iter().map(|job| job.1).collect();
    assert_eq!(jobs, [0..2, 2..4, 4..6, 6..8, 8..10]);
    // One span is not cut, whatever its length, but it has to fit into what is left.
    let limits = Limits { read_ahead_bytes: 10, ..LIMITS };
    let next = |demand_bytes| {
        let reader = InFlight { demand_bytes, ..IDLE };
        queue(&all).next(&reader, &limits).map(|job| job.spans)
    };
    assert_eq!(next(100), Some(0..1));
    assert_eq!(next(99), None);
}

#[test]
fn completion_begins_with_little_and_asks_for_much_at_a_time() {
    let all: Vec<_> = (0..10).map(|span| (0, span, Background)).collect();
    let check = |completion_bytes, background_bytes, expected| {
        let now = InFlight { background_bytes, speculative_bytes: background_bytes, ..IDLE };
        let limits = Limits { completion_bytes, ..LIMITS };
        let found = queue(&all).next(&now, &limits).map(|job| job.spans);
        assert_eq!(found, expected, "{completion_bytes} with {background_bytes} under way");
    };
    check(200, 0, Some(0..2));
    check(50, 0, Some(0..1));
    check(200, 100, Some(0..1));
    check(200, 101, None);
    check(1000, 500, Some(0..5));
    check(1000, 750, Some(0..2));
    check(1000, 751, None);
}

#[test]
fn what_is_fetched_ahead_has_room_in_memory() {
    let next = |class, memory_bytes, speculative_bytes| {
        let all: Vec<_> = (0..10).map(|span| (0, span, class)).collect();
        let now = InFlight { speculative_bytes, ..IDLE };
        let limits = Limits { memory_bytes, ..LIMITS };
        queue(&all).next(&now, &limits).map(|job| job.spans.len())
    };
    for class in [Prefetch, ReadAhead] {
        assert_eq!(next(class, 250, 1), Some(2));
        assert_eq!(next(class, 100, 1), Some(1));
        // The link may be idle because the processors are not.
        assert_eq!((next(class, 99, 1), next(class, 99, 0)), (None, None));
    }
    // A reader gets his span whatever there is, and nothing around it.
    assert_eq!((next(Demand, 0, 1), next(Demand, 200, 1)), (Some(1), Some(2)));
    assert!(next(Background, 0, 1).is_some());
}

#[test]
fn while_nobody_waits_the_link_is_kept_free_for_who_comes() {
    let all: Vec<_> = (0..10).map(|span| (0, span, Background)).collect();
    let next = |speculative_bytes| {
        let limits = Limits { idle_bytes: 400, ..LIMITS };
        queue(&all).next(&InFlight { speculative_bytes, ..IDLE }, &limits).map(|job| job.spans)
    };
    assert_eq!(next(0), Some(0..5));
    assert_eq!(next(100), Some(0..3));
    assert_eq!(next(350), None);
    assert_eq!(next(500), None);
}

#[test]
fn what_does_not_come_is_handed_out_once_more() {
    let mut queue = queue(&[(0, 0, Background), (0, 1, Background), (0, 2, Background)]);
    let first = queue.next(&IDLE, &LIMITS).unwrap();
    assert_eq!((first.spans, first.class), (0..3, Background));
    assert!(queue.again(LayerId(0), 1, Demand));
    let second = queue.next(&IDLE, &LIMITS).unwrap();
    assert_eq!((second.spans, second.class), (1..2, Demand));
    assert!(!queue.again(LayerId(0), 1, Demand), "two are enough");
    assert!(!queue.again(LayerId(0), 9, Demand), "it is not under way");
    queue.done(LayerId(0), 1..2, Outcome::Done);
    assert!(!queue.is_in_flight(LayerId(0), 1) && queue.is_in_flight(LayerId(0), 2));
    queue.done(LayerId(0), 0..3, Outcome::Done);
    assert_eq!(queue.want(LayerId(0), 1, Demand), Wanted::Queued);
}

#[test]
fn a_demand_without_a_connection_holds_speculation_back() {
    let mut queue = queue(&[(0, 9, Demand), (0, 0, ReadAhead)]);
    let limits = Limits { max_connections: 4, demand_connections: 0, ..LIMITS };
    let full = InFlight { demand: 4, ..IDLE };
    assert_eq!(queue.next(&full, &limits), None);
}

#[derive(Debug, Clone)]
enum Step {
    Want(u32, u32, Class),
    Unwant(u32, u32),
    Again(u32, u32),
    Next,
    Finish(prop::sample::Index, bool),
    Forget(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let class = prop_oneof![Just(Demand), Just(Prefetch), Just(ReadAhead), Just(Background)];
    prop_oneof![
        6 => (0_u32..3, 0_u32..26, class).prop_map(|(layer, span, class)| Step::Want(layer, span, class)),
        1 => (0_u32..3, 0_u32..26).prop_map(|(layer, span)| Step::Unwant(layer, span)),
        1 => (0_u32..3, 0_u32..26).prop_map(|(layer, span)| Step::Again(layer, span)),
        4 => Just(Step::Next),
        3 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(job, good)| Step::Finish(job, good)),
        1 => Just(Step::Forget(2)),
    ]
}

/// What must be true of the queue, kept in the simplest way.
#[derive(Default)]
struct Model {
    waiting: BTreeMap<(u32, u32), Class>,
    /// When each demand came.
    demands: BTreeMap<(u32, u32), u32>,
    flying: Vec<Job>,
    /// Their spans, without those that are wanted again.
    flying_spans: BTreeSet<(u32, u32)>,
    /// Which spans in flight somebody wants.
    flying_for: BTreeMap<(u32, u32), Class>,
    forgotten: bool,
    clock: u32,
}

impl Model {
    fn flight_of(&self, layer: u32, span: u32) -> bool {
        self.flying_spans.contains(&(layer, span))
    }

    fn want(&mut self, layer: u32, span: u32, class: Class) {
        self.clock += 1;
        let known = span < [10, 25, 7][usize::try_from(layer).unwrap()];
        if !known || layer == 2 && self.forgotten {
            return;
        }
        if self.flight_of(layer, span) {
            let wanted = self.flying_for.entry((layer, span)).or_insert(class);
            *wanted = class.min(*wanted);
            return;
        }
        let before = self.waiting.get(&(layer, span)).copied();
        if before.is_none_or(|before| class < before) {
            self.waiting.insert((layer, span), class);
            if class == Demand {
                self.demands.insert((layer, span), self.clock);
            }
        }
    }

    fn again(&mut self, layer: u32, span: u32) {
        assert!(self.flying_spans.remove(&(layer, span)));
        self.flying_for.remove(&(layer, span));
        self.want(layer, span, Demand);
    }

    fn unwant(&mut self, layer: u32, span: u32) {
        self.flying_for.remove(&(layer, span));
        self.waiting.remove(&(layer, span));
        self.demands.remove(&(layer, span));
    }

    fn in_flight(&self) -> InFlight {
        let mut now = IDLE;
        for job in &self.flying {
            let bytes = job.bytes.end - job.bytes.start;
            match job.class {
                Demand => {
                    now.demand += 1;
                    now.demand_bytes += bytes;
                }
                Prefetch | ReadAhead => now.read_ahead += 1,
                Background => {
                    now.background += 1;
                    now.background_bytes += bytes;
                }
            }
            if job.class != Demand {
                now.speculative_bytes += bytes;
            }
        }
        now
    }

    fn take(&mut self, job: Job, layers: &[Table], limits: &Limits) {
        let id = job.layer.0;
        let layer = &layers[usize::try_from(id).unwrap()];
        let now = self.in_flight();
        assert!(now.demand + now.read_ahead + now.background < limits.max_connections);
        let most = if job.class == Demand { limits.demand_bytes } else { limits.background_bytes };
        assert!(job.bytes.end - job.bytes.start <= most || job.spans.len() == 1);
        assert_eq!(job.bytes.start, layer.compressed(job.spans.start).start);
        assert_eq!(job.bytes.end, layer.compressed(job.spans.end - 1).end);
        let oldest = self.demands.iter().min_by_key(|(_, at)| **at).map(|(place, _)| *place);
        if let Some((layer, span)) = oldest {
            assert_eq!(job.class, Demand, "demand is never behind anything");
            assert!(layer == id && job.spans.contains(&span), "first come, first served");
        }
        assert!(self.waiting.contains_key(&(id, job.spans.start)));
        assert!(self.waiting.contains_key(&(id, job.spans.end - 1)));
        let mut gap = 0;
        for span in job.spans.clone() {
            assert!(self.flying_spans.insert((id, span)), "no span is handed out twice");
            self.demands.remove(&(id, span));
            gap = match self.waiting.remove(&(id, span)) {
                Some(class) => {
                    assert!(class >= job.class);
                    self.flying_for.insert((id, span), class);
                    0
                }
                None => gap + layer.compressed(span).end - layer.compressed(span).start,
            };
            assert!(gap <= limits.max_gap + 2 * u64::try_from(job.spans.len()).unwrap());
        }
        self.flying.push(job);
    }

    fn finish(&mut self, at: usize, again: bool) -> Job {
        let job = self.flying.remove(at);
        for span in job.spans.clone() {
            self.flying_spans.remove(&(job.layer.0, span));
            let wanted = self.flying_for.remove(&(job.layer.0, span));
            if let (true, Some(class)) = (again, wanted) {
                self.want(job.layer.0, span, class);
            }
        }
        job
    }

    fn forget(&mut self, layer: u32) {
        self.forgotten = true;
        self.waiting.retain(|place, _| place.0 != layer);
        self.demands.retain(|place, _| place.0 != layer);
        self.flying_for.retain(|place, _| place.0 != layer);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn it_keeps_its_promises(
        lengths in prop::collection::vec(1_u64..200, 42),
        shared: bool,
        max_gap in 0_u64..300,
        share in 0_u8..120,
        floor in 0_u64..400,
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let limits =
            Limits { max_gap, speculative_percent: share, speculative_bytes: floor, ..LIMITS };
        let layers: Vec<Table> = [0..10, 10..35, 35..42]
            .into_iter()
            .map(|part| Table { lengths: lengths[part].iter().map(|len| (*len, 10)).collect(), shared })
            .collect();
        let mut queue = Queue::new();
        for (id, layer) in (0..).zip(&layers) {
            queue.add_layer(LayerId(id), Arc::new(layer.clone()));
        }
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Want(layer, span, class) => {
                    queue.want(LayerId(layer), span, class);
                    model.want(layer, span, class);
                }
                Step::Unwant(layer, span) => {
                    queue.unwant(LayerId(layer), span);
                    model.unwant(layer, span);
                }
                Step::Again(layer, span) => {
                    if queue.again(LayerId(layer), span, Demand) {
                        model.again(layer, span);
                    }
                }
                Step::Next => {
                    if let Some(job) = queue.next(&model.in_flight(), &limits) {
                        model.take(job, &layers, &limits);
                    }
                }
                Step::Finish(at, good) if !model.flying.is_empty() => {
                    let job = model.finish(at.index(model.flying.len()), !good);
                    let outcome = if good { Outcome::Done } else { Outcome::Again };
                    queue.done(job.layer, job.spans, outcome);
                }
                Step::Finish(..) => {}
                Step::Forget(layer) => {
                    queue.forget(LayerId(layer));
                    model.forget(layer);
                }
            }
            prop_assert_eq!(queue.len(), model.waiting.len());
        }
        // Everything that is wanted is handed out in the end.
        let mut rounds = 0;
        while !model.waiting.is_empty() {
            while let Some(job) = queue.next(&model.in_flight(), &limits) {
                model.take(job, &layers, &limits);
            }
            prop_assert!(!model.flying.is_empty(), "stuck with {:?}", model.waiting);
            let job = model.finish(0, false);
            queue.done(job.layer, job.spans, Outcome::Done);
            rounds += 1;
            prop_assert!(rounds < 1000);
        }
        prop_assert!(queue.is_empty());
        prop_assert_eq!(queue.next(&IDLE, &limits), None);
    }
}
