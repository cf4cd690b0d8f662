//! What is looked at of a pull: the image and the credentials in its first message, and no more of it.

use std::fmt;

use bytes::Buf as _;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use prost::Message as _;
use tonic::body::Body;

/// The fields of `PullImageRequest` that matter here. Source of the numbers:
/// `pkg/apis/runtime/v1/api.proto` of Kubernetes' cri-api; those of v1alpha2 are the same.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<PullAuth>,
}

/// `ImageSpec`, of the same source.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// What an image is pulled with: `AuthConfig`, of the same source. containerd does not use its
/// `registry_token`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct PullAuth {
    /// The user.
    #[prost(string, tag = "1")]
    pub username: String,
    /// The user's password.
    #[prost(string, tag = "2")]
    pub password: String,
    /// User and password in base64, with a colon between them.
    #[prost(string, tag = "3")]
    pub auth: String,
    /// The only server that may see the rest.
    #[prost(string, tag = "4")]
    pub server_address: String,
    /// A refresh token.
    #[prost(string, tag = "5")]
    pub identity_token: String,
}

impl fmt::Debug for PullAuth {
    /// Without what is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullAuth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// The beginning of a request: as much of it as its first message takes, if that is not too long.
#[derive(Debug, Default)]
pub(super) struct FirstMessage {
    bytes: Vec<u8>,
}

impl FirstMessage {
    /// Reads it; the answer's other half is the whole body again.
    pub(super) async fn read(mut body: Body) -> (Self, Body) {
        let (mut first, mut frames) = (Self::default(), Vec::new());
        while !first.is_enough()
            && let Some(frame) = body.frame().await
        {
            if let Some(data) = frame.as_ref().ok().and_then(|frame| frame.data_ref()) {
                first.bytes.extend_from_slice(data);
            }
            let is_over = frame.is_err();
            frames.push(frame);
            if is_over {
                break;
            }
        }
        let whole = stream::iter(frames).chain(BodyStream::new(body));
        (first, Body::new(StreamBody::new(whole)))
    }

    /// Image and credentials, if it is a message that has both.
    pub(super) fn pull(&self) -> Option<(String, PullAuth)> {
        let request = PullImageRequest::decode(self.message()?).ok()?;
        Some((request.image?.image, request.auth?))
    }

    fn is_enough(&self) -> bool {
        self.bytes.len() > MOST_LOOKED_AT || self.message().is_some()
    }

    /// The message, if it is all there. In front of it are a byte that says whether it is compressed,
    /// which kubelets do not do, and its length.
    fn message(&self) -> Option<&[u8]> {
        let mut rest = self.bytes.as_slice();
        if rest.try_get_u8().ok()? != 0 {
            return None;
        }
        let len = usize::try_from(rest.try_get_u32().ok()?).ok()?;
        rest.get(..len)
    }
}

/// A Pod's annotations are in it too, of at most 256 KiB by the rules of Kubernetes.
const MOST_LOOKED_AT: usize = 1 << 20;
