//! What may be believed of bytes that lie on disk: checksums after an unclean shutdown, and flushing.

use std::io;

use super::{Layer, SpanState, crc_of_range, record_of};
use crate::disk::{self, Name};
use crate::map::{BootTag, Origin, Record};

/// The bytes of a span could not be compared with its checksum.
#[derive(Debug, thiserror::Error)]
#[error("reading span {span} back from the layer cache")]
pub struct CheckError {
    /// The span.
    pub span: u32,
    /// Why.
    pub source: io::Error,
}

/// The layer could not be made durable. What was written since the last time is in doubt: the kernel
/// may have dropped it, and each span is checked before its next use.
#[derive(Debug, thiserror::Error)]
#[error("flushing the layer to the disk")]
pub struct SyncError(#[from] io::Error);

impl Layer {
    /// Like [`touch`](Self::touch), but checks a span that is in doubt first.
    ///
    /// # Errors
    ///
    /// The bytes could not be read back.
    pub fn ensure_present(&self, span: u32) -> Result<bool, CheckError> {
        if self.touch(span) {
            return Ok(true);
        }
        if self.needs_check(span) { self.check(span) } else { Ok(false) }
    }

    /// Compares the bytes of a span in doubt with its checksum and settles what it is: present or
    /// missing. Says which; a span not in doubt is not read.
    ///
    /// # Errors
    ///
    /// The bytes could not be read; the span stays in doubt.
    pub fn check(&self, span: u32) -> Result<bool, CheckError> {
        if !self.needs_check(span) {
            return Ok(self.is_present(span));
        }
        let Some(record) = self.record(span) else { return Ok(false) };
        let found = self.crc_of(span).map_err(|source| CheckError { span, source })?;
        let mut map = self.map.lock();
        if record_of(&map, span) != Some(record) || !self.needs_check(span) {
            // Another thread has settled it, or evicted the span, meanwhile.
            return Ok(self.is_present(span));
        }
        if found != record.crc {
            // A record that stays on the disk is found wrong again after a restart.
            self.clear_record(&mut map, span).ok();
            self.set_state(span, SpanState::Missing);
            return Ok(false);
        }
        if record.origin != Origin::Disk {
            let record = Record { origin: Origin::Boot(self.shared.boot), ..record };
            // If the record stays as it was, the next start checks once more.
            self.put_record(&mut map, span, record).ok();
        }
        self.set_state(span, SpanState::Present);
        Ok(true)
    }

    /// Puts every present span in doubt, so that each is compared with its checksum before its next
    /// use: for a layer that lay on the disk while nobody looked after it. The disk is not changed, and
    /// a sealed layer neither: the kernel reads it without asking.
    pub fn doubt(&self) {
        let map = self.map.lock();
        if map.sealed.is_none() {
            for span in self.present_spans().iter() {
                self.set_state(span, SpanState::Unchecked);
            }
        }
    }

    /// Makes what is present now survive a power loss, for an orderly end or from time to time.
    ///
    /// Spans marked present while it runs may or may not be covered; a span changed afterwards is
    /// checked after a power loss as if this had not been called.
    ///
    /// # Errors
    ///
    /// The disk failed; then the spans written since the last success are in doubt.
    pub fn mark_clean(&self) -> Result<(), SyncError> {
        let doubtful: Vec<(u32, Record)> = {
            let map = self.map.lock();
            let spans = (0..).zip(&map.records);
            spans
                .filter_map(|(span, record)| Some((span, (*record)?)))
                .filter(|(span, record)| record.origin != Origin::Disk && self.is_present(*span))
                .collect()
        };
        if doubtful.is_empty() {
            return Ok(());
        }
        if let Err(error) = disk::sync(&self.data, Name::Data) {
            self.distrust(&doubtful);
            return Err(SyncError(error));
        }
        let mut map = self.map.lock();
        for (span, record) in doubtful {
            if record_of(&map, span) == Some(record) {
                self.put_record(&mut map, span, Record { origin: Origin::Disk, ..record })?;
            }
        }
        let file = map.file.clone();
        // Nobody who marks a span waits for the disk.
        drop(map);
        if let Some(file) = file {
            disk::sync(&file, Name::Map)?;
        }
        disk::sync_folder(&self.folder)?;
        Ok(())
    }

    /// After a failed flush the kernel may drop pages without writing them, so nothing that was not
    /// durable before can be believed any more, in this boot either.
    fn distrust(&self, spans: &[(u32, Record)]) {
        let mut map = self.map.lock();
        for &(span, record) in spans {
            if record_of(&map, span) == Some(record) {
                let record = Record { origin: Origin::Boot(BootTag::NONE), ..record };
                self.put_record(&mut map, span, record).ok();
                self.set_state(span, SpanState::Unchecked);
            }
        }
    }

    /// The crc32c of the bytes that the data file has for the span.
    pub(super) fn crc_of(&self, span: u32) -> io::Result<u32> {
        crc_of_range(&self.data, self.shape.range(span))
    }
}
