//! Golden documents, in the exact bytes of Go's encoder.

use super::*;
use crate::media_type::{DOCKER_CONFIG, DOCKER_LAYER_GZIP, DOCKER_MANIFEST, OCI_INDEX};
use crate::{Index, Platform};

const CONFIG: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

fn ztoc(n: u8, disable_xattrs: bool) -> ZtocEntry {
    ZtocEntry {
        digest: Digest::of(&[n]),
        size: 1000 + u64::from(n),
        layer_digest: Digest::of(&[n, n]),
        layer_media_type: DOCKER_LAYER_GZIP.to_owned(),
        span_size: 4 << 20,
        disable_xattrs,
    }
}

fn ztoc_json(n: u8, xattrs: &str) -> String {
    format!(
        r#"{{"mediaType":"application/octet-stream","digest":"{}","size":{},"annotations":{{{xattrs}"com.amazon.soci.image-layer-digest":"{}","com.amazon.soci.image-layer-mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","com.amazon.soci.span-size":"4194304"}}}}"#,
        Digest::of(&[n]),
        1000 + u64::from(n),
        Digest::of(&[n, n]),
    )
}

#[track_caller]
fn check_golden(index: &SociIndex, golden: &str) {
    assert_eq!(String::from_utf8(index.to_bytes()).unwrap(), golden);
    assert_eq!(&SociIndex::from_bytes(golden.as_bytes()).unwrap(), index);
    assert_eq!(index.descriptor().digest, Digest::of(golden.as_bytes()));
}

#[test]
fn version_1_is_written_to_the_byte() {
    let mut subject = Descriptor::of(DOCKER_MANIFEST, b"image");
    subject.platform = Some(Platform::new("linux", "amd64"));
    let index = SociIndex::v1(&subject, [ztoc(1, false), ztoc(2, true)]);
    let golden = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.amazon.soci.index.v1+json","digest":"{CONFIG}","size":2}},"layers":[{},{}],"subject":{{"mediaType":"{DOCKER_MANIFEST}","digest":"{}","size":5}},"annotations":{{"com.amazon.soci.build-tool-identifier":"AWS SOCI CLI v0.2"}}}}"#,
        ztoc_json(1, ""),
        ztoc_json(2, r#""com.amazon.soci.disable-xattrs":"true","#),
        Digest::of(b"image"),
    );
    check_golden(&index, &golden);
}

#[test]
fn version_2_is_written_to_the_byte() {
    let mut index = SociIndex::v2([ztoc(3, false)]);
    index.annotations.insert("note".to_owned(), "<&>\u{2028}".to_owned());
    let golden = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.amazon.soci.index.v2+json","digest":"{CONFIG}","size":2}},"layers":[{}],"annotations":{{"com.amazon.soci.build-tool-identifier":"AWS SOCI CLI v0.2","note":"\u003c\u0026\u003e\u2028"}}}}"#,
        ztoc_json(3, ""),
    );
    check_golden(&index, &golden);
}

#[test]
fn a_layers_ztoc_is_not_its_prefetch_document() {
    let mut index = SociIndex::v2([ztoc(1, false)]);
    let mut prefetch = ztoc(1, false).into_descriptor();
    prefetch.media_type = PREFETCH_TYPE.to_owned();
    index.layers.insert(0, prefetch.clone());
    let layer = Digest::of(&[1, 1]);
    assert_eq!(index.ztoc_for_layer(&layer), Some(&ztoc(1, false).into_descriptor()));
    assert_eq!(index.prefetch_for_layer(&layer), Some(&prefetch));
    assert_eq!(index.ztoc_for_layer(&Digest::of(b"small layer")), None);
}

#[test]
fn other_documents_are_not_soci_indexes() {
    let image = image_manifest().to_bytes();
    for (bytes, reason) in [
        (image.as_slice(), DOCKER_CONFIG),
        (br#"{"schemaVersion":2,"manifests":[]}"#, "not a manifest"),
        (b"[]", "not a manifest"),
    ] {
        let error = SociIndex::from_bytes(bytes).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn soci_indexes_are_known_by_their_artifact_type() {
    let index = SociIndex::v2([ztoc(1, false)]).descriptor();
    assert_eq!(soci_version(&index), Some(Version::V2));
    let mut other = index.clone();
    other.artifact_type = None;
    assert!(!is_soci_index(&other));
    let mut other = index;
    OCI_INDEX.clone_into(&mut other.media_type);
    assert!(!is_soci_index(&other));
}

#[test]
fn xattrs_are_disabled_by_what_go_reads_as_true() {
    let mut entry = ztoc(1, false).into_descriptor();
    assert!(!xattrs_disabled(&entry));
    for (value, disabled) in [("true", true), ("1", true), ("T", true), ("yes", false), ("", false)]
    {
        entry.annotations.insert(DISABLE_XATTRS.to_owned(), value.to_owned());
        assert_eq!(xattrs_disabled(&entry), disabled, "{value}");
    }
}

fn image_manifest() -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of(DOCKER_CONFIG, b"config"),
        layers: vec![Descriptor::of(DOCKER_LAYER_GZIP, b"layer")],
        subject: None,
        annotations: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
    }
}

fn conversion(image: &Manifest) -> Conversion {
    let soci_index = SociIndex::v2([ztoc(1, false)]).descriptor();
    let manifest = convert_manifest(image, &soci_index.digest).descriptor;
    Conversion { original: Digest::of(&image.to_bytes()), manifest, soci_index }
}

#[test]
fn a_converted_manifest_is_oci_names_its_index_and_keeps_its_layers() {
    let image = image_manifest();
    let soci_index = Digest::of(b"index");
    let converted = convert_manifest(&image, &soci_index);
    let Ok(ManifestOrIndex::Manifest(parsed)) = parse_manifest(None, &converted.bytes) else {
        panic!("not a manifest");
    };
    assert_eq!(index_of(&parsed), Some(soci_index));
    assert_eq!(parsed.layers, image.layers);
    assert_eq!(parsed.config.digest, image.config.digest);
    assert_eq!(parsed.config.media_type, "application/vnd.oci.image.config.v1+json");
    assert_eq!(parsed.annotations["k"], "v");
    assert_eq!(converted.descriptor.digest, Digest::of(&converted.bytes));
    assert_eq!(convert_manifest(&parsed, &soci_index), converted);
}

#[test]
fn images_come_before_soci_indexes_and_attestations_follow_their_image() {
    let image = image_manifest();
    let conversion = conversion(&image);
    let platform = Some(Platform::new("linux", "amd64"));
    let mut entry = Descriptor::of(DOCKER_MANIFEST, &image.to_bytes());
    entry.platform.clone_from(&platform);
    entry.annotations.insert("kept".to_owned(), "yes".to_owned());
    let mut attestation = Descriptor::of(OCI_MANIFEST, b"attestation");
    attestation.platform = Some(Platform::new("unknown", "unknown"));
    attestation.annotations = BTreeMap::from([
        (DOCKER_REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned()),
        (DOCKER_REFERENCE_DIGEST.to_owned(), entry.digest.to_string()),
    ]);
    let other = Descriptor {
        platform: Some(Platform::new("linux", "arm64")),
        ..Descriptor::of(OCI_MANIFEST, b"other")
    };
    let index = Index::new(vec![entry, attestation, other.clone()]);

    let converted = convert_index(&index, std::slice::from_ref(&conversion));
    let [image_entry, attestation, unconverted, soci_entry] = converted.manifests.as_slice() else {
        panic!("{converted:?}");
    };
    assert_eq!(image_entry.digest, conversion.manifest.digest);
    assert_eq!((&image_entry.platform, &*image_entry.media_type), (&platform, OCI_MANIFEST));
    assert_eq!(image_entry.annotations["kept"], "yes");
    assert_eq!(image_entry.annotations[INDEX_DIGEST], conversion.soci_index.digest.to_string());
    assert_eq!(
        attestation.annotations[DOCKER_REFERENCE_DIGEST],
        conversion.manifest.digest.to_string()
    );
    assert_eq!(unconverted, &other);
    assert!(is_soci_index(soci_entry));
    assert_eq!(soci_entry.platform, platform);
    assert_eq!(
        soci_entry.annotations[IMAGE_MANIFEST_DIGEST],
        conversion.manifest.digest.to_string()
    );
}

#[test]
fn converting_again_replaces_the_platforms_soci_index_and_keeps_the_others() {
    let image = image_manifest();
    let first = conversion(&image);
    let mut other_soci = SociIndex::v2([ztoc(9, false)]).descriptor();
    other_soci
        .annotations
        .insert(IMAGE_MANIFEST_DIGEST.to_owned(), Digest::of(b"other").to_string());
    let mut index = wrap_manifest(&Platform::new("linux", "amd64"), &first);
    index.manifests.push(other_soci.clone());

    let soci_index = SociIndex::v2([ztoc(2, false)]).descriptor();
    let manifest = convert_manifest(&image, &soci_index.digest).descriptor;
    let second = Conversion { original: first.manifest.digest, manifest, soci_index };
    let converted = convert_index(&index, std::slice::from_ref(&second));
    let soci: Vec<_> = converted.manifests.iter().filter(|entry| is_soci_index(entry)).collect();
    assert_eq!(soci.len(), 2);
    assert!(soci.contains(&&other_soci));
    assert!(soci.iter().any(|entry| entry.digest == second.soci_index.digest));
    assert_eq!(converted.images().count(), 1);
}
