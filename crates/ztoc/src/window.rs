//! Which bytes of its window a span really refers to.

use sys::inflate::{Inflate, InflateError, State, Stop};

use crate::spans::WINDOW_SIZE;

/// Finds out, span by span.
///
/// A span is inflated with three windows whose bytes tell their own place: low byte, high byte,
/// inverted low byte. Output that comes from the window, over however many copies, differs in every
/// bit between the first and the third; all other output is the same in both. Only the first 32 KiB
/// of output can refer to the window directly, and what refers to those is no new reference.
///
/// The memory is used again for each span: between all that is kept of a layer it would leave holes.
#[derive(Debug)]
pub(crate) struct Thinner {
    /// The beginning of the span, compressed.
    sample: Vec<u8>,
    inflate: Inflate,
    window: Vec<u8>,
    /// What the sample makes with each window.
    outputs: [Vec<u8>; 3],
    used: Vec<bool>,
}

/// How much of a span's compressed bytes is worth keeping in memory: 32 KiB of output take less,
/// unless the compressor wasted a lot.
const ENOUGH: usize = 1 << 17;

impl Thinner {
    pub(crate) fn new() -> Result<Self, InflateError> {
        Ok(Self {
            sample: Vec::with_capacity(ENOUGH),
            inflate: Inflate::raw()?,
            window: vec![0; WINDOW_SIZE],
            outputs: std::array::from_fn(|_window| vec![0; WINDOW_SIZE]),
            used: vec![false; WINDOW_SIZE],
        })
    }

    /// Takes the next compressed bytes of the span; the first is the one shared with the span before,
    /// if there is such.
    pub(crate) fn take(&mut self, compressed: &[u8]) {
        let room = ENOUGH.saturating_sub(self.sample.len());
        self.sample.extend_from_slice(compressed.get(..room).unwrap_or(compressed));
    }

    /// Sets to zero the bytes of `window` to which nothing in the span refers; the next span may begin.
    /// If what was kept of it ends before the question is decided, the window stays as it is.
    pub(crate) fn blank_unused(&mut self, bits: u8, window: &mut [u8]) {
        if self.find_used(bits).is_some() {
            for (byte, used) in window.iter_mut().zip(&self.used) {
                if !used {
                    *byte = 0;
                }
            }
        }
        self.sample.clear();
    }

    fn find_used(&mut self, bits: u8) -> Option<()> {
        let low = self.make(0, bits, low_byte)?;
        self.make(1, bits, |place| low_byte(place >> 8))?;
        self.make(2, bits, |place| !low_byte(place))?;
        self.used.fill(false);
        let [lows, highs, inverted] = &self.outputs;
        for ((low, high), inverted) in lows.iter().zip(highs).zip(inverted).take(low) {
            if low ^ inverted == 0xff {
                let place = usize::from(*high) << 8 | usize::from(*low);
                *self.used.get_mut(place)? = true;
            }
        }
        Some(())
    }

    /// The first 32 KiB that the span makes with the given window, or all up to the end of its member;
    /// returns how much that is.
    fn make(&mut self, number: usize, bits: u8, window: impl Fn(usize) -> u8) -> Option<usize> {
        for (place, byte) in self.window.iter_mut().enumerate() {
            *byte = window(place);
        }
        let (shared, mut input) = match self.sample.split_first() {
            Some((&first, rest)) if bits > 0 => (first, rest),
            _ => (0, self.sample.as_slice()),
        };
        self.inflate.resume_again(bits, shared, &self.window).ok()?;
        let output = self.outputs.get_mut(number)?;
        let mut filled = 0_usize;
        while filled < WINDOW_SIZE {
            let step = self.inflate.run(input, output.get_mut(filled..)?, Stop::Anywhere).ok()?;
            input = input.get(step.consumed..)?;
            filled = filled.checked_add(step.produced)?;
            match step.state {
                State::StreamEnd => break,
                _ if step.consumed == 0 && step.produced == 0 => return None,
                _ => {}
            }
        }
        Some(filled)
    }
}

fn low_byte(number: usize) -> u8 {
    u8::try_from(number & 0xff).unwrap_or_default()
}
