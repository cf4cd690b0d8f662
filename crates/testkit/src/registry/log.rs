//! Who asked for what, and how much was sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use parking_lot::Mutex;

/// One request and its answer so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestLog {
    /// The method, in capitals.
    pub method: String,
    /// The path without the query. Those of the second listener begin with `/cdn/`.
    pub path: String,
    /// The range asked for: first and last byte, of an open one `u64::MAX` as the last. `None` if there
    /// was none, or one of the form `bytes=-n`.
    pub range: Option<(u64, u64)>,
    /// The status; 0 if there is no answer yet, or never was one.
    pub status: u16,
    /// Bytes of body handed to the network. The client may have hung up before it got them.
    pub bytes_sent: u64,
    /// Whether the request had an `Authorization` header.
    pub authorization: bool,
}

impl RequestLog {
    /// Whether a blob was asked for, at the registry or at the second listener.
    #[must_use]
    pub fn is_blob(&self) -> bool {
        self.path.starts_with("/cdn/")
            || (self.path.contains("/blobs/") && !self.path.contains("/blobs/uploads/"))
    }
}

/// A request in the log that is still being answered.
#[derive(Debug)]
pub(super) struct LogEntry {
    request: RequestLog,
    status: AtomicU16,
    bytes_sent: AtomicU64,
}

impl LogEntry {
    pub(super) fn answered(&self, status: u16) {
        self.status.store(status, Ordering::Release);
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.bytes_sent.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::AcqRel);
    }

    fn snapshot(&self) -> RequestLog {
        RequestLog {
            status: self.status.load(Ordering::Acquire),
            bytes_sent: self.bytes_sent.load(Ordering::Acquire),
            ..self.request.clone()
        }
    }
}

/// All requests in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Log {
    entries: Mutex<Vec<Arc<LogEntry>>>,
}

impl Log {
    pub(super) fn begin(&self, request: RequestLog) -> Arc<LogEntry> {
        let entry = Arc::new(LogEntry {
            request,
            status: AtomicU16::new(0),
            bytes_sent: AtomicU64::new(0),
        });
        self.entries.lock().push(Arc::clone(&entry));
        entry
    }

    pub(super) fn snapshot(&self) -> Vec<RequestLog> {
        self.entries.lock().iter().map(|entry| entry.snapshot()).collect()
    }

    pub(super) fn clear(&self) {
        self.entries.lock().clear();
    }
}
