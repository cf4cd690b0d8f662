//! An image converted to SOCI version 2 with zTOCs of Hermes, in the node's layout and registry.

use std::fs;

use artifacts::{Image, ImageName, IndexStore, Origin};
use oci::soci::{CONFIG_BYTES, Conversion, SociIndex, ZtocEntry, convert_manifest, wrap_manifest};
use oci::{Digest, Platform};
use registry::{Client, ClientOptions};
use testnode::Node;

/// Uploads files of the layout, named by their digests: `B` blobs and `M` manifests, the latter with
/// their media type and reference.
const UPLOAD: &str = r#"
files=/srv/images/blobs/sha256
url=http://127.0.0.1:5000/v2/app
while read -r kind file type reference; do
  if [ "$kind" = B ]; then
    location=$(curl -sSf -X POST -o /dev/null -D - "$url/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
    curl -sSf -X PUT -H 'Content-Type: application/octet-stream' --data-binary "@$files/$file" "$location&digest=sha256:$file"
  else
    curl -sSf -X PUT -H "Content-Type: $type" --data-binary "@$files/$file" "$url/manifests/$reference"
  fi
done
"#;

/// Converts the image of `/srv/images`, for whose layers the store at `root` has indexes, and pushes
/// it as `app:v2` to the node's registry without TLS.
pub(crate) fn convert_and_push(node: &Node, root: &str) {
    let image = resolve(node);
    let store = IndexStore::open(&node.path(root).join("index")).unwrap();
    let mut uploads = Vec::new();
    let blob = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(node.path("/srv/images/blobs/sha256").join(digest.hex()), bytes).unwrap();
        digest.hex()
    };
    let mut entries = Vec::new();
    for layer in &image.layers {
        if store.load(&layer.digest).unwrap().is_none() {
            continue;
        }
        let (bytes, span_size) = store.soci_blob(&layer.digest).unwrap();
        uploads.push(format!("B {}", blob(&bytes)));
        entries.push(ZtocEntry {
            digest: Digest::of(&bytes),
            size: u64::try_from(bytes.len()).unwrap(),
            layer_digest: layer.digest,
            layer_media_type: layer.media_type.clone(),
            span_size,
            disable_xattrs: false,
        });
    }
    uploads.push(format!("B {}", blob(CONFIG_BYTES)));
    let index = SociIndex::v2(entries);
    let converted = convert_manifest(&image.manifest, &index.descriptor().digest);
    let conversion = Conversion {
        original: image.descriptor.digest,
        manifest: converted.descriptor.clone(),
        soci_index: index.descriptor(),
    };
    let outer = wrap_manifest(&image.config.platform(), &conversion).to_bytes();
    for (bytes, media_type, tag) in [
        (index.to_bytes(), oci::media_type::OCI_MANIFEST, None),
        (converted.bytes, oci::media_type::OCI_MANIFEST, None),
        (outer, oci::media_type::OCI_INDEX, Some("v2")),
    ] {
        let file = blob(&bytes);
        let reference = tag.map_or_else(|| format!("sha256:{file}"), str::to_owned);
        uploads.push(format!("M {file} {media_type} {reference}"));
    }
    let uploads = uploads.join("\n");
    node.bash(&format!("upload() {{\n{UPLOAD}\n}}\nupload <<'END'\n{uploads}\nEND\n")).unwrap();
}

fn resolve(node: &Node) -> Image {
    let dir = node.path("/srv/images");
    let name = ImageName::Layout { dir, tag: Some("app".to_owned()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let origin = Origin::open(&name, &Client::new(ClientOptions::default())).unwrap();
    runtime.block_on(origin.resolve(&Platform::host())).unwrap()
}
