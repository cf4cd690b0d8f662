//! Reading everything back.

use std::sync::atomic::Ordering;

use rustix::fs::Advice;

use super::{CheckError, Layer, SpanState};
use crate::disk::{self, Name};

/// What reading a layer back found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many spans were compared with their checksums.
    pub spans: u32,
    /// How many uncompressed bytes were read.
    pub bytes: u64,
    /// Spans whose bytes are wrong. They are missing now, unless the layer is sealed.
    pub damaged: Vec<u32>,
    /// Whether the bytes as a whole are wrong. Only so can a sealed layer be compared that has no
    /// checksums of spans, because it was sealed under another index.
    pub is_damaged: bool,
}

impl Report {
    /// Whether all bytes are what they were.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && !self.is_damaged
    }
}

impl Layer {
    /// Compares every span on disk with its checksum, and a sealed layer without checksums with its
    /// own. `progress` is told the number of bytes read so far.
    ///
    /// A damaged span becomes missing. In a sealed layer it cannot: the kernel reads it without
    /// asking, so the caller has to stop that first ([`unseal`](Self::unseal), evict).
    ///
    /// # Errors
    ///
    /// A span could not be read.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<Report, CheckError> {
        let sealed = {
            let map = self.map.lock();
            map.sealed.clone().filter(|_| map.file.is_none())
        };
        let mut report = Report::default();
        // What is in memory proves nothing about the disk; dirty pages stay where they are.
        rustix::fs::fadvise(&self.data, 0, None, Advice::DontNeed).ok();
        if let Some(sealed) = sealed {
            let mut crc = 0;
            for span in 0..self.shape.span_count() {
                let range = self.shape.range(span);
                report.bytes += range.end - range.start;
                self.read_range(range, &mut |bytes| crc = crc32c::crc32c_append(crc, bytes))
                    .map_err(|source| CheckError { span, source })?;
                progress(report.bytes);
            }
            report.is_damaged = crc != sealed.crc32c;
            return Ok(report);
        }
        for span in 0..self.shape.span_count() {
            if self.state(span) == SpanState::Missing {
                continue;
            }
            let range = self.shape.range(span);
            if !self.verify_span(span)? {
                report.damaged.push(span);
            }
            report.spans += 1;
            report.bytes += range.end - range.start;
            progress(report.bytes);
        }
        Ok(report)
    }

    fn verify_span(&self, span: u32) -> Result<bool, CheckError> {
        if self.needs_check(span) {
            return self.check(span);
        }
        let Some(record) = self.record(span) else { return Ok(true) };
        let found = self.crc_of(span).map_err(|source| CheckError { span, source })?;
        let mut map = self.map.lock();
        if found == record.crc || super::record_of(&map, span) != Some(record) {
            return Ok(true);
        }
        if map.sealed.is_none() {
            self.losses.fetch_add(1, Ordering::SeqCst);
            self.set_state(span, SpanState::Missing);
            self.clear_record(&mut map, span).map_err(|source| CheckError { span, source })?;
            // The old record vouches for the bytes, so it must not come back after a power loss.
            if let Some(file) = &map.file {
                disk::sync(file, Name::Map).map_err(|source| CheckError { span, source })?;
            }
        }
        Ok(false)
    }
}
