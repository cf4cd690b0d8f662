//! Random lives of a layer against a model that knows what may be present.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Fill(u32),
    Check(u32),
    Evict(Vec<u32>),
    MarkClean,
    Verify,
    Seal,
    Unseal,
    /// The process dies and starts again.
    Restart,
    /// The machine dies, and some of the spans that were not flushed are lost.
    PowerLoss(Vec<u32>),
    /// A bit of a span turns over.
    RotData(u32, prop::sample::Index),
    /// A bit of the map turns over while the process is down.
    RotMap(prop::sample::Index, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let spans = || prop::collection::vec(0_u32..6, 0..5);
    prop_oneof![
        8 => (0_u32..6).prop_map(Step::Fill),
        3 => (0_u32..6).prop_map(Step::Check),
        3 => spans().prop_map(Step::Evict),
        2 => Just(Step::MarkClean),
        1 => Just(Step::Verify),
        1 => Just(Step::Seal),
        1 => Just(Step::Unseal),
        1 => Just(Step::Restart),
        2 => spans().prop_map(Step::PowerLoss),
        1 => (0_u32..6, any::<prop::sample::Index>()).prop_map(|(span, at)| Step::RotData(span, at)),
        1 => (any::<prop::sample::Index>(), 0_u32..8).prop_map(|(at, bit)| Step::RotMap(at, bit)),
    ]
}

/// Whether a span was written, and what a power loss leaves of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Kept {
    #[default]
    Missing,
    InMemory,
    OnDisk,
}

#[derive(Debug, Clone, Copy, Default)]
struct Span {
    kept: Kept,
    /// Its bytes on disk are wrong, and nobody has looked since.
    wrong: bool,
}

impl Span {
    fn written(kept: Kept) -> Self {
        Self { kept, wrong: false }
    }

    fn is_written(self) -> bool {
        self.kept != Kept::Missing
    }
}

struct World {
    folder: tempfile::TempDir,
    boot: u32,
    layer: Option<Layer>,
    spans: [Span; 6],
    /// The map was changed behind the layer's back, so spans may be missing that need not be.
    rotten_map: bool,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let layer = Some(open(folder.path(), "0"));
        Self { folder, boot: 0, layer, spans: <[Span; 6]>::default(), rotten_map: false }
    }

    fn layer(&self) -> &Layer {
        self.layer.as_ref().unwrap()
    }

    fn restart(&mut self) {
        self.layer = None;
        self.layer = Some(open(self.folder.path(), &self.boot.to_string()));
    }

    fn flip(&self, offset: u64) {
        let mut byte = [0];
        self.layer().data().read_exact_at(&mut byte, offset).unwrap();
        self.layer().data().write_all_at(&[!byte[0]], offset).unwrap();
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Fill(span) => {
                if !self.layer().is_present(span) {
                    fill(self.layer(), span).unwrap();
                    self.spans[at(span)] = Span::written(Kept::InMemory);
                }
            }
            Step::Check(span) => {
                let was_in_doubt = self.layer().needs_check(span);
                let answer = self.layer().check(span).unwrap();
                let model = &mut self.spans[at(span)];
                if was_in_doubt {
                    assert!(!(answer && model.wrong), "wrong bytes pass the check");
                    assert!(answer || model.wrong, "right bytes fail the check");
                    *model = Span::written(if answer { Kept::InMemory } else { Kept::Missing });
                }
            }
            Step::Evict(spans) => self.evict(&spans),
            Step::MarkClean => {
                self.layer().mark_clean().unwrap();
                self.all_present_are_durable();
            }
            Step::Verify => self.verify(),
            Step::Seal => {
                if self.layer().seal(Digest::of(b"not looked at"), 50_001).is_ok() {
                    assert!(self.spans.iter().all(|span| span.is_written()));
                }
                self.all_present_are_durable();
            }
            Step::Unseal => self.layer().unseal().unwrap(),
            Step::Restart => self.restart(),
            Step::PowerLoss(lost) => {
                for span in lost {
                    let range = shape().range(span);
                    let model = &mut self.spans[at(span)];
                    if model.kept == Kept::InMemory {
                        model.wrong = true;
                        let zeros = vec![0; usize::try_from(range.end - range.start).unwrap()];
                        self.layer().data().write_all_at(&zeros, range.start).unwrap();
                    }
                }
                self.boot += 1;
                self.restart();
            }
            Step::RotData(span, where_in) => {
                // Twice the same would put it right again.
                if self.spans[at(span)].is_written() && !self.spans[at(span)].wrong {
                    let range = shape().range(span);
                    let len = usize::try_from(range.end - range.start).unwrap();
                    self.flip(range.start + u64::try_from(where_in.index(len)).unwrap());
                    self.spans[at(span)].wrong = true;
                }
            }
            Step::RotMap(where_in, bit) => {
                let path = self.folder.path().join("map");
                let mut bytes = std::fs::read(&path).unwrap();
                let len = bytes.len();
                bytes[where_in.index(len)] ^= 1_u8 << bit;
                std::fs::write(&path, bytes).unwrap();
                self.rotten_map = true;
                self.restart();
            }
        }
    }

    fn evict(&mut self, spans: &[u32]) {
        let Ok(evicted) = evict(self.layer(), spans) else {
            assert!(self.layer().is_sealed());
            return;
        };
        for span in evicted.spans {
            self.spans[at(span)] = Span::default();
        }
        for span in spans {
            assert_eq!(self.layer().state(*span), SpanState::Missing);
        }
    }

    fn verify(&mut self) {
        let was_whole = self.layer().is_sealed();
        let report = self.layer().verify(&mut |_| {}).unwrap();
        if report.spans == 0 && was_whole {
            // Without a map there is only the checksum of the whole.
            assert_eq!(report.is_damaged, self.spans.iter().any(|span| span.wrong));
            return;
        }
        for span in 0..6 {
            let model = &mut self.spans[at(span)];
            let damaged = report.damaged.contains(&span);
            assert!(!damaged || model.wrong, "right bytes are reported");
            if self.layer.as_ref().unwrap().is_present(span) && !was_whole {
                assert!(!model.wrong, "wrong bytes pass");
            }
            if damaged && !was_whole {
                *model = Span::default();
            }
        }
    }

    fn all_present_are_durable(&mut self) {
        for span in 0..6 {
            if self.layer().is_present(span) {
                self.spans[at(span)].kept = Kept::OnDisk;
            }
        }
    }

    fn assert_sound(&self) {
        for span in 0..6 {
            let (layer, model) = (self.layer(), self.spans[at(span)]);
            let state = layer.state(span);
            assert!(
                model.is_written() || state == SpanState::Missing,
                "span {span} came from nowhere"
            );
            assert!(
                !model.is_written() || state != SpanState::Missing || self.rotten_map,
                "span {span} is lost: {model:?}"
            );
            if state == SpanState::Present && !model.wrong {
                assert!(read_span(layer, span) == bytes_of(shape().range(span)), "span {span}");
            }
        }
    }
}

fn at(span: u32) -> usize {
    usize::try_from(span).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_never_claims_more_than_the_model(steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
            world.assert_sound();
        }
    }
}
