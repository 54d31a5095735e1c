//! Shortens an image's history, which an image's author controls, so that it fits into an answer.

use crate::api::image::ImageHistory;

/// The length limit of one text of a step, in characters.
const TEXT_CHARS_MAX: usize = 16 << 10;
/// The end of a text that was shortened.
const SHORTENED: &str = " [...]";

/// The newest steps of a history.
#[derive(Debug, Default, PartialEq)]
pub struct Shortened {
    /// Oldest first.
    pub steps: Vec<ImageHistory>,
    /// The number of older steps.
    pub omitted: u64,
}

/// Returns the newest steps that take at most `bytes_max` as JSON together.
pub fn shorten(history: Vec<ImageHistory>, bytes_max: usize) -> Shortened {
    let all = history.len();
    let mut left = bytes_max;
    let mut steps: Vec<ImageHistory> = history
        .into_iter()
        .rev()
        .map(with_short_texts)
        .take_while(|step| {
            let bytes = serde_json::to_vec(step).map_or(usize::MAX, |json| json.len() + 1);
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            fits
        })
        .collect();
    steps.reverse();
    let omitted = (all - steps.len()) as u64;
    Shortened { steps, omitted }
}

fn with_short_texts(mut step: ImageHistory) -> ImageHistory {
    let texts = [
        &mut step.created,
        &mut step.created_by,
        &mut step.author,
        &mut step.comment,
    ];
    for text in texts.into_iter().flatten() {
        if let Some((end, _)) = text.char_indices().nth(TEXT_CHARS_MAX) {
            text.truncate(end);
            text.push_str(SHORTENED);
        }
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(created_by: &str) -> ImageHistory {
        ImageHistory {
            created_by: Some(created_by.to_owned()),
            ..ImageHistory::default()
        }
    }

    #[test]
    fn history_that_fits_is_unchanged() {
        let history = vec![step("COPY"), step("RUN make")];
        let expected = Shortened {
            steps: history.clone(),
            omitted: 0,
        };
        assert_eq!(shorten(history, 1000), expected);
    }

    #[test]
    fn oldest_steps_and_ends_of_texts_are_omitted() {
        // A control character takes six bytes as JSON.
        let hostile = "\u{1}".repeat(1 << 20);
        let history: Vec<_> = (0..10)
            .map(|_| step(&hostile))
            .chain([step("RUN")])
            .collect();
        let shortened = shorten(history, 256 << 10);
        assert_eq!((shortened.steps.len(), shortened.omitted), (3, 8));
        assert_eq!(shortened.steps[2], step("RUN"));
        let text = shortened.steps[0].created_by.clone().unwrap();
        assert!(text.ends_with("\u{1} [...]"));
        assert!(serde_json::to_vec(&shortened.steps).unwrap().len() <= 256 << 10);
    }
}
