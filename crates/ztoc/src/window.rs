//! Which bytes of its window a span really refers to.

use sys::inflate::{Inflate, State, Stop};

use crate::spans::WINDOW_SIZE;

/// Sets to zero the bytes of `window` to which nothing in the span refers. `compressed` begins with
/// the byte shared with the span before, if `bits` is not 0, and need not be complete: if it ends
/// before the question is decided, the window stays as it is.
///
/// The span is inflated with three windows whose bytes tell their own place: low byte, high byte,
/// inverted low byte. Output that comes from the window, over however many copies, differs in every
/// bit between the first and the third; all other output is the same in both. Only the first 32 KiB
/// of output can refer to the window directly, and what refers to those is no new reference.
pub(crate) fn blank_unused(bits: u8, compressed: &[u8], window: &mut [u8]) {
    let used = || {
        let low = first_output(bits, compressed, low_byte)?;
        let high = first_output(bits, compressed, |place| low_byte(place >> 8))?;
        let inverted = first_output(bits, compressed, |place| !low_byte(place))?;
        let mut used = vec![false; WINDOW_SIZE];
        for ((low, high), inverted) in low.into_iter().zip(high).zip(inverted) {
            if low ^ inverted == 0xff {
                let place = usize::from(high) << 8 | usize::from(low);
                *used.get_mut(place)? = true;
            }
        }
        Some(used)
    };
    let Some(used) = used() else { return };
    for (byte, used) in window.iter_mut().zip(used) {
        if !used {
            *byte = 0;
        }
    }
}

/// How much of a span's compressed bytes [`blank_unused`] is worth keeping in memory for: 32 KiB of
/// output take less, unless the compressor wasted a lot.
pub(crate) const ENOUGH: usize = 1 << 17;

/// The first 32 KiB that a span makes with a given window, or all up to the end of its member.
fn first_output(bits: u8, compressed: &[u8], window: impl Fn(usize) -> u8) -> Option<Vec<u8>> {
    let window: Vec<u8> = (0..WINDOW_SIZE).map(window).collect();
    let (shared, mut input) = match compressed.split_first() {
        Some((&first, rest)) if bits > 0 => (first, rest),
        _ => (0, compressed),
    };
    let mut inflate = Inflate::resume(bits, shared, &window).ok()?;
    let mut output = vec![0; WINDOW_SIZE];
    let mut filled = 0_usize;
    while filled < WINDOW_SIZE {
        let step = inflate.run(input, output.get_mut(filled..)?, Stop::Anywhere).ok()?;
        input = input.get(step.consumed..)?;
        filled = filled.checked_add(step.produced)?;
        match step.state {
            State::StreamEnd => break,
            _ if step.consumed == 0 && step.produced == 0 => return None,
            _ => {}
        }
    }
    output.truncate(filled);
    Some(output)
}

fn low_byte(number: usize) -> u8 {
    u8::try_from(number & 0xff).unwrap_or_default()
}
