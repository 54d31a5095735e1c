//! Generates names such as `brave-otter` for VMs that are created without a name.

use crate::ids::VmName;

const ADJECTIVES: &[&str] = &[
    "able", "amber", "brave", "brisk", "calm", "clever", "cosy", "crisp", "deft", "eager", "early",
    "fair", "fleet", "fond", "gentle", "glad", "grand", "happy", "hardy", "jolly", "keen", "kind",
    "lively", "lucky", "mellow", "merry", "mild", "neat", "nimble", "noble", "patient", "plain",
    "proud", "quick", "quiet", "rapid", "ready", "rosy", "sharp", "shy", "silent", "snug", "solid",
    "spry", "stout", "sunny", "swift", "tidy", "vivid", "warm", "wise", "witty", "young", "zesty",
];
const NOUNS: &[&str] = &[
    "acorn", "badger", "beaver", "birch", "bison", "brook", "cedar", "clover", "comet", "crane",
    "dune", "eagle", "elm", "falcon", "fern", "finch", "fox", "glade", "harbor", "hawk", "heron",
    "island", "ivy", "lark", "lemur", "lynx", "maple", "marten", "meadow", "moose", "oak",
    "orchid", "osprey", "otter", "owl", "pebble", "pine", "plover", "quail", "raven", "reed",
    "river", "robin", "sparrow", "spruce", "stork", "swan", "thistle", "tiger", "trout", "tulip",
    "walnut", "willow", "wren",
];

/// Returns the `n`-th candidate for a seed. The first 16 candidates are plain pairs of words. Later
/// candidates have a number, so that they never run out.
pub(super) fn candidate(seed: u64, n: u32) -> VmName {
    let mixed = seed
        .wrapping_add(u64::from(n))
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let adjective = ADJECTIVES[(mixed >> 33) as usize % ADJECTIVES.len()];
    let noun = NOUNS[(mixed >> 17) as usize % NOUNS.len()];
    let name = if n < 16 {
        format!("{adjective}-{noun}")
    } else {
        format!("{adjective}-{noun}-{}", mixed % 100_000)
    };
    name.parse().expect("words make a valid name")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_pair_of_words_is_a_valid_name() {
        for adjective in ADJECTIVES {
            for noun in NOUNS {
                assert!(
                    format!("{adjective}-{noun}-99999")
                        .parse::<VmName>()
                        .is_ok()
                );
            }
        }
    }

    #[test]
    fn candidates_of_one_seed_differ() {
        let names: HashSet<_> = (0..200).map(|n| candidate(7, n)).collect();
        assert!(names.len() > 150, "{}", names.len());
    }
}
