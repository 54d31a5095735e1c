//! The messages between the daemon and the helper that pulls an image: JSON, one message per
//! packet. The job and the result may be longer than a packet, so they are in files.

use crate::api::op::{PARTS_MAX, Part};
use crate::error::{Error, Kind};
use crate::host::text::printable;
use crate::image::oci::limits::LAYERS_MAX;
use serde::{Deserialize, Serialize};

/// The size limit of a message in either direction.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The size limit of the job, which includes certificates.
pub(super) const JOB_BYTES_MAX: u64 = 4 << 20;
/// The size limit of the result.
pub(super) const RESULT_BYTES_MAX: u64 = 8 << 20;
/// The length limit of an error's text, and of its hint.
const TEXT_CHARS_MAX: usize = 1000;

/// A message to the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// The first message. Its descriptors are the job, the image's file, the result and, for an
    /// archive, the stream.
    Pull,
    /// Answers [`Request::Found`] if the image must be pulled, and [`Request::Partial`] if there is
    /// no file for the blob.
    Continue,
    /// Answers [`Request::Partial`]. The descriptor is the file for the compressed bytes, with
    /// those that an earlier pull has received.
    Partial,
    /// Answers [`Request::Layer`]. The descriptor is the layer's tar archive, for reading.
    Cached,
    /// Answers [`Request::Layer`] and [`Request::File`]. The descriptor is an empty file.
    Empty,
}

/// A message from the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// The image is known, but none of its layers has been read.
    Found(Found),
    /// Asks for the file of a layer.
    Layer {
        diff_id: String,
    },
    /// The empty file of this layer is complete.
    Stored {
        diff_id: String,
        /// The digest of the blob that the layer came from.
        blob: String,
    },
    /// Asks for the file of a blob that is fetched now.
    Partial {
        digest: String,
    },
    /// Asks for an empty file.
    File,
    Progress(Progress),
    /// The image's file and the result are complete.
    Done,
    Failed(Failure),
}

impl Request {
    /// True if the daemon answers with an [`Order`].
    pub(super) fn has_answer(&self) -> bool {
        matches!(
            self,
            Self::Found(_) | Self::Layer { .. } | Self::Partial { .. } | Self::File
        )
    }
}

/// The image that a reference or an archive stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// The digest of its manifest.
    pub digest: String,
    /// Its name in the archive, if it has one.
    pub name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub stage: String,
    /// In bytes, as is `total`.
    pub done: u64,
    pub total: Option<u64>,
    /// The layers; see [`crate::api::op::Progress`].
    pub parts: Vec<Part>,
    pub parts_total: Option<u64>,
}

/// The length limit of a stage.
const STAGE_CHARS_MAX: usize = 100;
/// The length limit of a part's name, which is the beginning of a digest.
const PART_CHARS_MAX: usize = 20;

impl Progress {
    /// Shortens the texts and lists of a report, which may come from a helper that an image has
    /// taken over.
    pub(super) fn bounded(mut self) -> Self {
        let short = |text: &str, max| printable(text).chars().take(max).collect();
        self.stage = short(&self.stage, STAGE_CHARS_MAX);
        self.parts.truncate(PARTS_MAX);
        for part in &mut self.parts {
            part.name = short(&part.name, PART_CHARS_MAX);
            part.done = part.done.min(part.total);
        }
        self.parts_total = self.parts_total.map(|total| total.min(LAYERS_MAX as u64));
        self
    }
}

/// An error of the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::image) struct Failure {
    /// The name of a [`Kind`].
    pub kind: String,
    pub text: String,
    pub hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        let short = |text: &str| text.chars().take(TEXT_CHARS_MAX).collect();
        Self {
            kind: e.kind().name().to_owned(),
            text: short(&e.to_string()),
            hint: e.hint_text().map(short),
        }
    }
}

impl Failure {
    /// Returns the error, whose texts may come from a registry or from a helper that an image has
    /// taken over.
    pub(in crate::image) fn into_error(self) -> Error {
        let short =
            |text: &str| -> String { printable(text).chars().take(TEXT_CHARS_MAX).collect() };
        let kind = Kind::ALL.iter().find(|kind| kind.name() == self.kind);
        let error = Error::new(kind.copied().unwrap_or(Kind::Host), short(&self.text));
        match self.hint {
            Some(hint) => error.hint(short(&hint)),
            None => error,
        }
    }
}

pub(in crate::image) fn encode(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("only strings and numbers")
}

/// Decodes a message. Returns None if it is malformed.
pub(in crate::image) fn decode<'a, T: Deserialize<'a>>(message: &'a [u8]) -> Option<T> {
    serde_json::from_slice(message).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::op::PartState;

    #[test]
    fn failure_is_read_back_without_control_characters() {
        let error = Error::new(Kind::DiskFull, "write \u{1b}[2Jlayer").hint("free some space");
        let back = Failure::from(&error).into_error();
        assert_eq!(
            (back.kind(), back.to_string().as_str(), back.hint_text()),
            (
                Kind::DiskFull,
                "write \\u{1b}[2Jlayer",
                Some("free some space")
            )
        );
        let strange = Failure {
            kind: "no such kind".to_owned(),
            text: "x".repeat(9999),
            hint: None,
        };
        let back = strange.into_error();
        assert_eq!(back.kind(), Kind::Host);
        assert_eq!(back.to_string().len(), TEXT_CHARS_MAX);
    }

    #[test]
    fn report_is_bounded_and_fits_into_message() {
        let part = |name: String| Part {
            name,
            state: PartState::Downloading,
            done: u64::MAX,
            total: u64::MAX - 1,
        };
        let report = |parts: Vec<Part>| Progress {
            stage: "fetch".to_owned(),
            done: u64::MAX,
            total: Some(u64::MAX),
            parts,
            parts_total: Some(u64::MAX),
        };
        let honest = vec![part("0123456789ab".to_owned()); PARTS_MAX];
        let message = encode(&Request::Progress(report(honest)));
        assert!(message.len() < MESSAGE_BYTES_MAX / 2, "{}", message.len());

        let hostile = vec![part("\u{1b}[2J".repeat(99)); 10 * PARTS_MAX];
        let bounded = report(hostile).bounded();
        assert_eq!(bounded.parts.len(), PARTS_MAX);
        assert_eq!(bounded.parts_total, Some(LAYERS_MAX as u64));
        let first = &bounded.parts[0];
        assert_eq!(first.name, "\\u{1b}[2J\\u{1b}[2J\\u");
        assert_eq!(first.done, first.total);
    }

    #[test]
    fn messages_are_read_back() {
        let request = Request::Layer {
            diff_id: "sha256:1".to_owned(),
        };
        assert_eq!(decode::<Request>(&encode(&request)), Some(request));
        assert_eq!(decode::<Order>(&encode(&Order::Pull)), Some(Order::Pull));
        for bad in [&b""[..], b"{", b"\"nothing\"", b"{\"layer\":{}}", b"\xff"] {
            assert_eq!(decode::<Request>(bad), None);
        }
    }
}
