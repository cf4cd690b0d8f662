//! What will probably be read next, seen from what was read so far.
//!
//! It serves the starts that nobody recorded yet. Files of a package lie next to each other in the
//! tar, are mostly small and are read whole, so the bytes behind a read are a good guess.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{Spans, covering};

/// Which guesses are made; each can be switched off, so that its worth can be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Layers of at most this many compressed bytes are wanted whole, at once.
    pub whole_small_layers: Option<u64>,
    /// Ascending reads fetch ahead of themselves, twice as far each time.
    pub sequential: bool,
    /// How far ahead an ascending reader gets at first, in uncompressed bytes.
    pub first_window: u64,
    /// How far ahead an ascending reader gets at most, in uncompressed bytes.
    pub max_window: u64,
    /// Files of at most this many uncompressed bytes are wanted whole when touched.
    pub whole_small_files: Option<u64>,
    /// How many spans behind each demand are wanted with it.
    pub neighbours: u32,
    /// The second demand in a file that is not a small one wants twice so many uncompressed bytes around it,
    /// and each one after it twice as many again, up to `max_window`.
    pub large_files: Option<u64>,
    /// Whether the second demand in a directory wants the rest of it, up to `max_directory`.
    pub directory: bool,
    /// The longest directory, in uncompressed bytes of the tar, that is wanted whole.
    pub max_directory: u64,
    /// How many compressed bytes of one layer may have been guessed without having been read, when nothing
    /// was read yet. Each byte that is read allows another one, so that a program that reads much of a
    /// layer is not left to its own reads, and no more than about as much again is fetched in vain. Whole
    /// small layers do not count.
    pub first_unread: u64,
    /// However much was read, not more than this may have been guessed in vain.
    pub max_unread: u64,
}

impl Default for Rules {
    /// Layers up to 2 MiB; windows from 1 MiB to 32 MiB, also in large files; files up to 1 MiB; one
    /// neighbour; directories up to 8 MiB; 32 MiB unread at first, 512 MiB at most.
    fn default() -> Self {
        Self {
            whole_small_layers: Some(2 << 20),
            sequential: true,
            first_window: 1 << 20,
            max_window: 32 << 20,
            whole_small_files: Some(1 << 20),
            neighbours: 1,
            large_files: Some(1 << 20),
            directory: true,
            max_directory: 8 << 20,
            first_unread: 32 << 20,
            max_unread: 512 << 20,
        }
    }
}

impl Rules {
    /// No guesses at all.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            whole_small_layers: None,
            sequential: false,
            first_window: 0,
            max_window: 0,
            whole_small_files: None,
            neighbours: 0,
            large_files: None,
            directory: false,
            max_directory: 0,
            first_unread: 0,
            max_unread: 0,
        }
    }
}

/// What is known about the file that a demand belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHint {
    /// Where its content lies in the uncompressed layer.
    pub file: Range<u64>,
    /// From the first to the last byte of the files in the same directory, as they lie in the
    /// layer.
    pub directory: Range<u64>,
}

/// An ascending reader.
#[derive(Debug, Clone)]
struct Stream {
    /// Where its last demand ended.
    at: u64,
    /// How far ahead of it spans were wanted.
    ahead: u64,
    /// How long the window is; 0 until the reader has ascended once.
    window: u64,
}

/// The read-ahead of one layer.
#[derive(Clone)]
pub struct ReadAhead {
    rules: Rules,
    spans: Arc<dyn Spans + Send + Sync>,
    /// How many uncompressed bytes one guess may want.
    reach: u64,
    state: Vec<SpanState>,
    unread: u64,
    read: u64,
    streams: VecDeque<Stream>,
    /// The directories that were touched once, the latest last.
    directories: VecDeque<Range<u64>>,
    /// The large files that were touched, the latest last, and how much is wanted around the next demand.
    files: VecDeque<(Range<u64>, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SpanState {
    Unknown,
    /// Guessed, and not read yet.
    Guessed,
    /// Asked for by a reader, or wanted with the whole layer.
    Read,
}

/// How many ascending readers are followed in one layer: a dynamic loader maps several libraries
/// while other threads read files.
const STREAMS: usize = 8;

/// How many directories are remembered after one demand.
const DIRECTORIES: usize = 64;

/// How many large files are remembered.
const FILES: usize = 64;

/// A demand that starts this many bytes behind the last one still continues it: tar headers and
/// padding lie between files, and readers skip small holes.
const SLACK: u64 = 128 << 10;

impl ReadAhead {
    /// Follows the demands of one layer.
    ///
    /// It keeps one byte of state for each span.
    #[must_use]
    pub fn new(rules: Rules, spans: Arc<dyn Spans + Send + Sync>) -> Self {
        let state = (0..spans.len()).map(|_| SpanState::Unknown).collect();
        Self {
            rules,
            spans,
            reach: u64::MAX,
            state,
            unread: 0,
            read: 0,
            streams: VecDeque::new(),
            directories: VecDeque::new(),
            files: VecDeque::new(),
        }
    }

    /// From now on no guess wants more than this many uncompressed bytes: over a slow link a guess that is
    /// wrong costs more than one that is not made.
    pub const fn set_reach(&mut self, bytes: u64) {
        self.reach = bytes;
    }

    /// The spans to want as soon as the layer is mounted: all of a small layer.
    pub fn on_mount(&mut self) -> Vec<u32> {
        let small = |threshold| self.spans.compressed_len() <= threshold;
        if !self.rules.whole_small_layers.is_some_and(small) {
            return Vec::new();
        }
        let wanted = (0..self.spans.len())
            .filter(|span| self.state_of(*span) == Some(SpanState::Unknown))
            .collect();
        self.state.fill(SpanState::Read);
        self.unread = 0;
        wanted
    }

    /// Takes in that a reader wants the uncompressed bytes `range`, and answers which spans to fetch
    /// besides those of the range, the likeliest first.
    ///
    /// No span is answered twice, and none that was demanded before; whether one is present already
    /// is for the caller to see.
    pub fn on_demand(&mut self, range: Range<u64>, file: Option<FileHint>) -> Vec<u32> {
        let mut guesses = self.on_mount();
        let demanded = covering(&*self.spans, &range);
        if demanded.is_empty() {
            return guesses;
        }
        for span in demanded.clone() {
            self.mark_read(span);
        }
        guesses.retain(|span| !demanded.contains(span));
        if let Some(hint) = &file {
            let length = hint.file.end.saturating_sub(hint.file.start);
            if self.rules.whole_small_files.is_some_and(|most| length <= most) {
                self.guess_bytes(&hint.file, &mut guesses);
            } else if let Some(first) = self.rules.large_files {
                for around in self.around(first, &range, &hint.file) {
                    self.guess_bytes(&around, &mut guesses);
                }
            }
        }
        if self.rules.sequential
            && let Some(ahead) = self.follow(&range)
        {
            self.guess_bytes(&ahead, &mut guesses);
        }
        let behind = demanded.end.saturating_add(self.rules.neighbours).min(self.spans.len());
        self.guess_spans(demanded.end..behind, &mut guesses);
        if let Some(hint) = file.filter(|_| self.rules.directory)
            && self.second_in_directory(&hint.directory)
        {
            // What lies behind the file is likelier: loaders and archivers both sort by name.
            self.guess_bytes(&(range.end..hint.directory.end), &mut guesses);
            self.guess_bytes(&hint.directory, &mut guesses);
        }
        guesses
    }

    /// Takes in that a reader has read the uncompressed bytes `range`, which were there, and answers which
    /// spans to fetch for what he will read next.
    pub fn on_hit(&mut self, range: &Range<u64>) -> Vec<u32> {
        let mut guesses = Vec::new();
        for span in covering(&*self.spans, range) {
            self.mark_read(span);
        }
        if self.rules.sequential
            && let Some(ahead) = self.follow(range)
        {
            self.guess_bytes(&ahead, &mut guesses);
        }
        guesses
    }

    /// Forgets that spans were fetched, after they were evicted or could not be had.
    pub fn forget(&mut self, spans: impl IntoIterator<Item = u32>) {
        for span in spans {
            self.set(span, SpanState::Unknown);
        }
    }

    /// How many compressed bytes were guessed and not read so far.
    #[must_use]
    pub const fn unread_bytes(&self) -> u64 {
        self.unread
    }

    fn state_of(&self, span: u32) -> Option<SpanState> {
        self.state.get(usize::try_from(span).ok()?).copied()
    }

    fn set(&mut self, span: u32, state: SpanState) {
        let Some(place) = usize::try_from(span).ok().and_then(|at| self.state.get_mut(at)) else {
            return;
        };
        let before = std::mem::replace(place, state);
        let range = self.spans.compressed(span);
        let bytes = range.end.saturating_sub(range.start);
        match before {
            SpanState::Unknown => {}
            SpanState::Guessed => self.unread = self.unread.saturating_sub(bytes),
            SpanState::Read => self.read = self.read.saturating_sub(bytes),
        }
        match state {
            SpanState::Unknown => {}
            SpanState::Guessed => self.unread = self.unread.saturating_add(bytes),
            SpanState::Read => self.read = self.read.saturating_add(bytes),
        }
    }

    fn mark_read(&mut self, span: u32) {
        self.set(span, SpanState::Read);
    }

    fn guess_bytes(&mut self, bytes: &Range<u64>, guesses: &mut Vec<u32>) {
        self.guess_spans(covering(&*self.spans, bytes), guesses);
    }

    fn guess_spans(&mut self, spans: Range<u32>, guesses: &mut Vec<u32>) {
        let allowed = self.rules.first_unread.saturating_add(self.read).min(self.rules.max_unread);
        for span in spans {
            if self.state_of(span) != Some(SpanState::Unknown) {
                continue;
            }
            let range = self.spans.compressed(span);
            let bytes = range.end.saturating_sub(range.start);
            if self.unread.saturating_add(bytes) > allowed {
                return;
            }
            self.set(span, SpanState::Guessed);
            guesses.push(span);
        }
    }

    /// The bytes to have ready for the reader that this demand belongs to, if it ascends.
    fn follow(&mut self, range: &Range<u64>) -> Option<Range<u64>> {
        let continues = |stream: &Stream| {
            range.start >= stream.at.saturating_sub(SLACK)
                && range.start <= stream.ahead.max(stream.at).saturating_add(SLACK)
                && range.end > stream.at
        };
        let Some(found) = self.streams.iter().position(continues) else {
            if self.streams.len() == STREAMS {
                self.streams.pop_front();
            }
            self.streams.push_back(Stream { at: range.end, ahead: range.end, window: 0 });
            return None;
        };
        let mut stream = self.streams.remove(found)?;
        // As in the kernel, the window moves when its first half has been read.
        let left = stream.ahead.saturating_sub(range.end);
        let moves = left <= stream.window / 2;
        if moves {
            let doubled = stream.window.saturating_mul(2).max(self.rules.first_window);
            stream.window = doubled.min(self.rules.max_window.min(self.reach));
            stream.ahead = range.end.saturating_add(stream.window);
        }
        stream.at = range.end;
        let ahead = range.end..stream.ahead;
        self.streams.push_back(stream);
        moves.then_some(ahead)
    }

    /// What to want of a large file around a demand in it: nothing at first, then more each time, and more
    /// of what lies behind it than before it.
    fn around(&mut self, first: u64, demand: &Range<u64>, file: &Range<u64>) -> [Range<u64>; 2] {
        let most = self.rules.max_window.min(self.reach);
        let first = first.min(most);
        let window = match self.files.iter_mut().find(|(known, _)| known == file) {
            Some((_, window)) => {
                *window = window.saturating_mul(2).clamp(first, most);
                *window
            }
            None => {
                if self.files.len() == FILES {
                    self.files.pop_front();
                }
                self.files.push_back((file.clone(), first));
                return [0..0, 0..0];
            }
        };
        let behind = demand.end..demand.end.saturating_add(window / 4 * 3).min(file.end);
        let before = demand.start.saturating_sub(window / 4).max(file.start)..demand.start;
        [behind, before]
    }

    /// Whether this is the second demand in a directory that is short enough to be wanted whole.
    fn second_in_directory(&mut self, directory: &Range<u64>) -> bool {
        let longest = self.rules.max_directory.min(self.reach);
        if directory.end.saturating_sub(directory.start) > longest {
            return false;
        }
        if self.directories.contains(directory) {
            return true;
        }
        if self.directories.len() == DIRECTORIES {
            self.directories.pop_front();
        }
        self.directories.push_back(directory.clone());
        false
    }
}

impl fmt::Debug for ReadAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadAhead")
            .field("rules", &self.rules)
            .field("unread", &self.unread)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
