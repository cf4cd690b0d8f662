//! Building a zTOC in one pass over a layer that streams by.

mod gzip;

use oci::{Digest, Hasher, WholeHasher};
use sys::inflate::InflateError;

use crate::document::{Ztoc, ZtocTooLarge, encode};
use crate::limits::Limits;
use crate::spans::{
    BadZinfo, Checkpoint, Compression, SpanParts, SpanTable, gzip_header, plain_zinfo,
};
use crate::tar::{TarError, TarScanner};
use crate::toc::TocEntry;
use gzip::GzipSpans;

/// How to build.
#[derive(Debug, Clone)]
pub struct IndexerOptions {
    /// How the layer is compressed.
    pub compression: Compression,
    /// After how many bytes of the tar, at least, a new span begins; not 0 for a plain layer.
    pub span_size: u64,
    /// What the document names as its builder.
    pub build_tool: String,
    /// Whether to keep, of the windows, only the bytes that are referred to (the others are zero,
    /// which compresses well). Every reader decodes the same from it, but it is another document
    /// than AWS's tool would write, with another digest.
    pub sparse_windows: bool,
    /// Spans of another size too, from the same pass; only of gzip.
    pub also: Option<SpanOptions>,
    /// Whether the digests of the whole layer, and of what it unpacks to, are computed by threads of their
    /// own: inflating goes on meanwhile.
    pub digests_aside: bool,
    /// What is refused.
    pub limits: Limits,
}

impl IndexerOptions {
    /// Begins a digest of a whole layer, on the thread that these options say.
    #[must_use]
    pub fn whole_hasher(&self) -> WholeHasher {
        if self.digests_aside { WholeHasher::aside() } else { WholeHasher::here() }
    }
}

/// How a layer is cut into spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanOptions {
    /// See [`IndexerOptions::span_size`].
    pub span_size: u64,
    /// See [`IndexerOptions::sparse_windows`].
    pub sparse_windows: bool,
}

impl Default for SpanOptions {
    /// As AWS's tool.
    fn default() -> Self {
        Self { span_size: 4 << 20, sparse_windows: false }
    }
}

impl Default for IndexerOptions {
    /// As AWS's tool: gzip, 4 MiB, its name, whole windows.
    fn default() -> Self {
        let SpanOptions { span_size, sparse_windows } = SpanOptions::default();
        Self {
            compression: Compression::Gzip,
            span_size,
            build_tool: "AWS SOCI CLI v0.2".to_owned(),
            sparse_windows,
            also: None,
            digests_aside: false,
            limits: Limits::default(),
        }
    }
}

/// A layer that cannot be indexed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// It is not gzip, or damaged, or something follows its last member.
    #[error("the layer is no valid gzip at byte {at}")]
    Inflate {
        /// Where in the layer.
        at: u64,
        /// What the inflater says.
        source: InflateError,
    },
    /// It ends too early.
    #[error("the layer ends in the middle of a gzip member, at byte {at}")]
    Truncated {
        /// The size of what came.
        at: u64,
    },
    /// What it holds is not a tar.
    #[error("the layer holds no usable tar")]
    Tar(#[from] TarError),
    /// It is larger than what is taken in.
    #[error("the uncompressed layer is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The limit in force.
        limit: u64,
    },
    /// Its index is larger than what is taken in, or than the format can hold.
    #[error("the layer's index is too large; a larger span size makes it smaller")]
    IndexTooLarge,
    /// The span size asked for cannot be used with a plain layer.
    #[error("the span size of an uncompressed layer must not be 0")]
    NoSpanSize,
}

impl From<ZtocTooLarge> for IndexError {
    fn from(ZtocTooLarge: ZtocTooLarge) -> Self {
        Self::IndexTooLarge
    }
}

/// What one pass over a layer found.
#[derive(Debug, Clone)]
pub struct BuiltIndex {
    /// The index.
    pub ztoc: Ztoc,
    /// The index as a document, with the windows.
    pub ztoc_bytes: Vec<u8>,
    /// The index with the other spans, as a document, if it was asked for.
    pub also: Option<Vec<u8>>,
    /// The sha256 of the whole uncompressed layer: what the image's config calls its DiffID.
    pub diff_id: Digest,
    /// The sha256 of the layer as it came.
    pub layer_digest: Digest,
    /// The size of the layer as it came, in bytes.
    pub layer_size: u64,
    /// The size of the whole uncompressed layer in bytes, padding included.
    pub uncompressed_total: u64,
}

/// Builds an index from a layer that comes piece by piece; how it is cut changes nothing.
///
/// It needs the memory of the windows (32 KiB for each span), of the table of contents, and about
/// half a MiB.
#[derive(Debug)]
pub struct Indexer {
    span_size: u64,
    also: Option<u64>,
    build_tool: String,
    limits: Limits,
    spans: Spans,
    layer: WholeHasher,
    layer_size: u64,
    output: Output,
}

/// Where uncompressed bytes go.
type Deliver<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), IndexError>;

#[derive(Debug)]
enum Spans {
    Gzip(Box<GzipSpans>),
    Plain(PlainSpans),
}

/// Where the uncompressed bytes go.
#[derive(Debug)]
struct Output {
    /// Not of a plain layer: there it is the layer's digest.
    diff_id: Option<WholeHasher>,
    tar: TarScanner,
    total: u64,
    limit: u64,
}

impl Output {
    fn put(&mut self, bytes: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<(), IndexError> {
        self.total = self.total.saturating_add(to_u64(bytes.len()));
        if self.total > self.limit {
            return Err(IndexError::TooLarge { limit: self.limit });
        }
        if let Some(diff_id) = &mut self.diff_id {
            diff_id.update(bytes);
        }
        self.tar.push(bytes)?;
        sink(bytes);
        Ok(())
    }
}

impl Indexer {
    /// Starts with no bytes.
    ///
    /// # Errors
    /// [`IndexError::NoSpanSize`], and [`IndexError::Inflate`] without memory.
    pub fn new(options: IndexerOptions) -> Result<Self, IndexError> {
        let is_gzip = options.compression == Compression::Gzip;
        let (layer, diff_id) = (options.whole_hasher(), is_gzip.then(|| options.whole_hasher()));
        let IndexerOptions {
            compression, span_size, build_tool, sparse_windows, also, limits, ..
        } = options;
        let spans = match compression {
            Compression::Gzip => {
                let spans = SpanOptions { span_size, sparse_windows };
                Spans::Gzip(Box::new(GzipSpans::new(spans, also, limits.ztoc)?))
            }
            Compression::Uncompressed if span_size == 0 => return Err(IndexError::NoSpanSize),
            Compression::Uncompressed => Spans::Plain(PlainSpans::new(span_size)),
        };
        Ok(Self {
            span_size,
            also: also.map(|also| also.span_size),
            build_tool,
            limits,
            spans,
            layer,
            layer_size: 0,
            output: Output {
                diff_id,
                tar: TarScanner::new(limits),
                total: 0,
                limit: limits.uncompressed,
            },
        })
    }

    /// Takes the next bytes of the layer. `sink` gets all the uncompressed bytes that they complete,
    /// in order, and never bytes of two spans at once.
    ///
    /// # Errors
    /// See [`IndexError`]; the indexer is of no more use then. `sink` may have got bytes of a layer
    /// that turns out to be damaged: only [`BuiltIndex::diff_id`] tells that they are right.
    pub fn push(
        &mut self,
        compressed: &[u8],
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), IndexError> {
        self.layer.update(compressed);
        self.layer_size = self.layer_size.saturating_add(to_u64(compressed.len()));
        match &mut self.spans {
            Spans::Gzip(spans) => spans.push(compressed, &mut |bytes| self.output.put(bytes, sink)),
            Spans::Plain(spans) => {
                spans.push(compressed, &mut |bytes| self.output.put(bytes, sink))
            }
        }
    }

    /// The entries of the tar found so far.
    #[must_use]
    pub fn entries(&self) -> &[TocEntry] {
        self.output.tar.entries()
    }

    /// Completes the index after the last byte.
    ///
    /// # Errors
    /// [`IndexError::Truncated`], [`IndexError::Tar`] and [`IndexError::IndexTooLarge`].
    pub fn finish(self) -> Result<BuiltIndex, IndexError> {
        let Self { span_size, also, build_tool, limits, spans, layer, layer_size, output } = self;
        let toc = match output.tar.finish() {
            Ok(toc) => Ok(toc),
            // Of a layer cut short, that is the news, not that its tar is.
            Err(error) => spans.check_complete().and(Err(IndexError::Tar(error))),
        }?;
        let archive_size = toc.archive_size;
        let (compression, parts, others) = match spans {
            Spans::Gzip(spans) => {
                let (parts, others) = spans.finish()?;
                (Compression::Gzip, parts, others)
            }
            Spans::Plain(spans) => (Compression::Uncompressed, spans.finish(layer_size), None),
        };
        let document = |toc, span_size, parts: FoundSpans| {
            let spans = SpanTable::try_from(SpanParts {
                compression,
                span_size,
                compressed_size: layer_size,
                uncompressed_size: archive_size,
                checkpoints: parts.checkpoints,
                digests: parts.digests,
                zinfo: 0..0,
                unrecorded: 0,
                apart: None,
            })
            .map_err(|BadZinfo(_what)| IndexError::IndexTooLarge)?;
            let mut ztoc = Ztoc {
                version: "0.9".to_owned(),
                build_tool: build_tool.clone(),
                compressed_size: layer_size,
                uncompressed_size: archive_size,
                toc,
                spans,
            };
            let (bytes, zinfo) = encode(&ztoc, parts.zinfo)?;
            if to_u64(bytes.len()) > limits.ztoc {
                return Err(IndexError::IndexTooLarge);
            }
            ztoc.spans = ztoc.spans.moved_to(zinfo);
            Ok((ztoc, bytes))
        };
        let (ztoc, ztoc_bytes) = document(toc.entries, span_size, parts)?;
        let (ztoc, also) = match (others, also) {
            (Some(others), Some(span_size)) => {
                let Ztoc { toc, spans, .. } = ztoc;
                let (other, bytes) = document(toc, span_size, others)?;
                (Ztoc { spans, ..other }, Some(bytes))
            }
            _ => (ztoc, None),
        };
        let layer_digest = layer.finish();
        Ok(BuiltIndex {
            ztoc,
            ztoc_bytes,
            also,
            diff_id: output.diff_id.map_or(layer_digest, WholeHasher::finish),
            layer_digest,
            layer_size,
            uncompressed_total: output.total,
        })
    }
}

impl Spans {
    fn check_complete(&self) -> Result<(), IndexError> {
        match self {
            Self::Gzip(spans) => spans.check_complete(),
            Self::Plain(_) => Ok(()),
        }
    }
}

/// The spans as found.
#[derive(Debug)]
struct FoundSpans {
    checkpoints: Vec<Checkpoint>,
    digests: Vec<Digest>,
    zinfo: Vec<u8>,
}

/// The spans of a plain tar: pieces of equal size.
#[derive(Debug)]
struct PlainSpans {
    span_size: u64,
    hasher: Hasher,
    /// How many bytes the hasher has.
    filled: u64,
    digests: Vec<Digest>,
}

impl PlainSpans {
    fn new(span_size: u64) -> Self {
        Self { span_size, hasher: Hasher::new(), filled: 0, digests: Vec::new() }
    }

    fn push(&mut self, mut bytes: &[u8], deliver: Deliver<'_>) -> Result<(), IndexError> {
        while !bytes.is_empty() {
            let room = self.span_size.saturating_sub(self.filled);
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (piece, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
            self.hasher.update(piece);
            self.filled = self.filled.saturating_add(to_u64(len));
            if self.filled == self.span_size {
                self.end_span();
            }
            deliver(piece)?;
            bytes = rest;
        }
        Ok(())
    }

    fn end_span(&mut self) {
        self.digests.push(std::mem::take(&mut self.hasher).finish());
        self.filled = 0;
    }

    fn finish(mut self, size: u64) -> FoundSpans {
        if self.filled > 0 {
            self.end_span();
        }
        let offsets =
            (0..to_u64(self.digests.len())).map(|index| index.saturating_mul(self.span_size));
        let point = |offset| Checkpoint { compressed: offset, uncompressed: offset, bits: 0 };
        FoundSpans {
            checkpoints: offsets.map(point).collect(),
            zinfo: plain_zinfo(self.span_size, size),
            digests: self.digests,
        }
    }
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
