//! A zTOC as a document: version 0.9, as AWS's tools read and write it.
//!
//! A bare flatbuffer of five tables; the fields' places in them stand in `parse` and `encode`.

mod encode;
mod parse;

use oci::Digest;

use crate::spans::{
    Compression, SpanId, SpanTable, WINDOW_SIZE, apart_record, gzip_header, gzip_record,
};
use crate::toc::TocEntry;

pub(crate) use encode::encode;
pub use parse::{ParseZtocError, TocEntries};

/// The index of one layer: its files and its spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ztoc {
    /// The format's version; there is only `0.9`.
    pub version: String,
    /// Who built it.
    pub build_tool: String,
    /// The size of the layer's blob in bytes.
    pub compressed_size: u64,
    /// The size of the layer's tar in bytes, through the two zero blocks at its end; padding after
    /// these is not counted.
    pub uncompressed_size: u64,
    /// The entries of the tar in archive order.
    pub toc: Vec<TocEntry>,
    /// Where the layer can be entered.
    pub spans: SpanTable,
}

/// A zTOC that its format cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the index would be larger than 2 GiB, which the zTOC format cannot hold")]
pub struct ZtocTooLarge;

impl Ztoc {
    /// Writes the document, byte for byte as Go's builder would. The windows are taken from `blob`,
    /// the document that this value was parsed from or that was built with it.
    ///
    /// # Errors
    /// [`ZtocTooLarge`].
    pub fn to_bytes(&self, blob: &[u8]) -> Result<Vec<u8>, ZtocTooLarge> {
        let place = self.spans.zinfo_range();
        let range = usize::try_from(place.start).ok().zip(usize::try_from(place.end).ok());
        let zinfo = range.and_then(|(start, end)| blob.get(start..end)).unwrap_or_default();
        encode(self, zinfo.to_vec()).map(|(bytes, _place)| bytes)
    }

    /// The window that a span is decoded with; empty if it needs none. `blob` is the document that
    /// this value was parsed from or that was built with it (if it is cut short, or the windows are apart:
    /// empty as well, which [`crate::SpanDecoder`] refuses).
    #[must_use]
    pub fn window<'b>(&self, blob: &'b [u8], span: SpanId) -> &'b [u8] {
        let start = self.spans.window(span).and_then(|window| window.position());
        let start = start.and_then(|at| usize::try_from(at).ok());
        start.and_then(|start| blob.get(start..start.checked_add(WINDOW_SIZE)?)).unwrap_or_default()
    }

    /// The document of the same index with its windows apart. They are taken from `blob`, the document that
    /// this value was parsed from or that was built with it, and `frame` gets them in the order of their spans:
    /// it returns what the blob of windows has for one.
    ///
    /// # Errors
    /// What `frame` says, and [`ZtocTooLarge`].
    ///
    /// # Panics
    /// If the layer is not gzip: other layers have no windows.
    pub fn with_windows_apart<E: From<ZtocTooLarge>>(
        &self,
        blob: &[u8],
        mut frame: impl FnMut(&[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let mut zinfo = self.gzip_header();
        for span in self.spans.ids() {
            let frame = match self.window(blob, span) {
                [] => None,
                window => {
                    let frame = frame(window)?;
                    let size = u32::try_from(frame.len()).expect("a frame of some KiB");
                    Some((size, Digest::of(&frame)))
                }
            };
            apart_record(&mut zinfo, &self.spans.checkpoint(span), frame);
        }
        Ok(encode(self, zinfo)?.0)
    }

    /// The document with its windows inside, as everybody reads it; `window` gives that of a span whose
    /// window is not in the document.
    ///
    /// # Errors
    /// What `window` says, and [`ZtocTooLarge`].
    ///
    /// # Panics
    /// If the layer is not gzip: other layers have no windows.
    pub fn with_windows_inside<E: From<ZtocTooLarge>>(
        &self,
        mut window: impl FnMut(SpanId) -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let mut zinfo = self.gzip_header();
        for span in self.spans.ids() {
            let window = match self.spans.window(span) {
                Some(_) => window(span)?,
                None => vec![0; WINDOW_SIZE],
            };
            gzip_record(&mut zinfo, &self.spans.checkpoint(span), &window);
        }
        Ok(encode(self, zinfo)?.0)
    }

    fn gzip_header(&self) -> Vec<u8> {
        assert_eq!(self.spans.compression(), Compression::Gzip, "a layer with windows");
        gzip_header(self.spans.len(), self.spans.span_size()).to_vec()
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "layers made here fit into any address space")]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::limits::Limits;
    use crate::spans::{RECORD_LEN, Window};
    use crate::{Indexer, IndexerOptions, SparseMap};

    /// A layer in two spans, with a sparse file in PAX version 1.0.
    fn built() -> crate::BuiltIndex {
        let mut tar = tar::Builder::new(Vec::new());
        let records = [
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"9999"),
        ];
        tar.append_pax_extensions(records).unwrap();
        let mut data = b"1\n100\n700\n".to_vec();
        data.resize(512 + 700, b'z');
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, "sparse", data.as_slice()).unwrap();
        header.set_size(3);
        tar.append_data(&mut header, "after", &b"abc"[..]).unwrap();
        let tar = tar.into_inner().unwrap();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        for part in tar.chunks(2000) {
            encoder.write_all(part).unwrap();
            encoder.flush().unwrap();
        }
        let options = IndexerOptions { span_size: 2500, ..IndexerOptions::default() };
        let mut indexer = Indexer::new(options).unwrap();
        indexer.push(&encoder.finish().unwrap(), &mut |_bytes| {}).unwrap();
        indexer.finish().unwrap()
    }

    #[test]
    fn zinfo_of_version_1_is_read_and_written_as_it_was() {
        let built = built();
        let range = built.ztoc.spans.zinfo_range();
        let zinfo = &built.ztoc_bytes[range.start as usize..range.end as usize];
        let version_1 = [&zinfo[..12], &zinfo[12 + RECORD_LEN..]].concat();
        let (blob, _place) = encode(&built.ztoc, version_1).unwrap();
        let ztoc = Ztoc::parse(&blob, &Limits::default()).unwrap();
        assert!(ztoc.spans.len() > 1);
        for span in ztoc.spans.ids() {
            assert_eq!(ztoc.spans.checkpoint(span), built.ztoc.spans.checkpoint(span));
            assert!(ztoc.window(&blob, span) == built.ztoc.window(&built.ztoc_bytes, span));
        }
        assert!(ztoc.to_bytes(&blob).unwrap() == blob);
    }

    #[test]
    fn windows_are_put_apart_and_back() {
        let built = built();
        let mut windows = Vec::new();
        let halved = |window: &[u8]| {
            let frame = window[WINDOW_SIZE / 2..].to_vec();
            windows.extend_from_slice(&frame);
            Ok::<_, ZtocTooLarge>(frame)
        };
        let document = built.ztoc.with_windows_apart(&built.ztoc_bytes, halved).unwrap();
        let apart = Ztoc::parse(&document, &Limits::default()).unwrap();
        let with_window = apart.spans.ids().filter(|span| apart.spans.window(*span).is_some());
        let spans = u64::try_from(with_window.count()).unwrap();
        assert!(spans > 0);
        assert_eq!(apart.spans.windows_apart(), Some(spans * WINDOW_SIZE as u64 / 2));
        assert_eq!(apart.spans.windows_apart(), Some(windows.len() as u64));
        assert_eq!(apart.toc, built.ztoc.toc);
        for span in apart.spans.ids() {
            assert_eq!(apart.spans.checkpoint(span), built.ztoc.spans.checkpoint(span));
            assert_eq!(apart.spans.digest(span), built.ztoc.spans.digest(span));
            let window = built.ztoc.window(&built.ztoc_bytes, span);
            let Some(Window::Apart(frame)) = apart.spans.window(span) else {
                assert!(window.is_empty());
                continue;
            };
            let found = &windows[frame.range.start as usize..frame.range.end as usize];
            assert!(found == &window[WINDOW_SIZE / 2..]);
            assert_eq!(frame.digest, Digest::of(found));
            assert!(apart.window(&document, span).is_empty());
        }
        assert!(apart.to_bytes(&document).unwrap() == document);
        let window =
            |span| Ok::<_, ZtocTooLarge>(built.ztoc.window(&built.ztoc_bytes, span).to_vec());
        assert!(apart.with_windows_inside(window).unwrap() == built.ztoc_bytes);
    }

    #[test]
    fn sparse_maps_survive() {
        let built = built();
        let ztoc = Ztoc::parse(&built.ztoc_bytes, &Limits::default()).unwrap();
        assert_eq!(ztoc, built.ztoc);
        let map = SparseMap { pieces: vec![(100, 700)], logical_size: 9999 };
        assert_eq!(ztoc.toc[0].sparse, Some(map));
        assert_eq!(ztoc.toc[0].size, 700);
    }

    #[test]
    fn sizes_of_sparse_files_as_aws_writes_them_are_put_right() {
        let mut built = built();
        built.ztoc.toc[0].size = 9999;
        let (blob, _place) = encode(&built.ztoc, vec![0; 12]).unwrap();
        Ztoc::parse(&blob, &Limits::default()).unwrap_err();
        let blob = built.ztoc.to_bytes(&built.ztoc_bytes).unwrap();
        assert_eq!(Ztoc::parse(&blob, &Limits::default()).unwrap().toc[0].size, 700);
        // Without a record of the file's size it is what the archive holds, however little the map
        // takes of it.
        let records = |size: &[u8]| {
            let records = [("GNU.sparse.map", &b"500,5"[..]), ("GNU.sparse.numblocks", b"1")];
            let mut records = [&records[..], &[("GNU.sparse.size", size)]].concat();
            records.retain(|(_, value)| !value.is_empty());
            let owned = |text: &[u8]| text.to_vec();
            records.into_iter().map(|(key, value)| (owned(key.as_bytes()), owned(value))).collect()
        };
        for (size, found) in [(&b""[..], 700), (b"700", 5), (b"9999", 700)] {
            let mut built = built.clone();
            (built.ztoc.toc[0].size, built.ztoc.toc[0].pax) = (700, records(size));
            let blob = built.ztoc.to_bytes(&built.ztoc_bytes).unwrap();
            let parsed = Ztoc::parse(&blob, &Limits::default()).unwrap();
            assert_eq!(parsed.toc[0].size, found);
            let again = parsed.to_bytes(&blob).unwrap();
            assert_eq!(Ztoc::parse(&again, &Limits::default()).unwrap().toc, parsed.toc);
        }
        // A map that is missing must not be taken for an ordinary file.
        built.ztoc.toc[0].pax.retain(|(key, _)| key != crate::sparse::MAP);
        let blob = built.ztoc.to_bytes(&built.ztoc_bytes).unwrap();
        let error = Ztoc::parse(&blob, &Limits::default()).unwrap_err();
        assert!(matches!(error, ParseZtocError::Unsupported { .. }), "{error:?}");
    }
}
