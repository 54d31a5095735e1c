//! Mutates inputs: bits, bytes, numbers, pieces, and the target's words.

pub struct Mutator {
    random: u64,
    words: &'static [&'static str],
    bytes_max: usize,
}

/// Numbers at which arithmetic often fails.
const NUMBERS: [&str; 10] = [
    "0",
    "-1",
    "1",
    "127",
    "255",
    "65535",
    "65537",
    "2147483648",
    "4294967296",
    "18446744073709551616",
];
/// Limit of the changes to one input.
const CHANGES_MAX: usize = 8;
/// Limit of the repetitions of a piece. Repetition makes inputs long.
const REPEATS_MAX: usize = 2000;

impl Mutator {
    pub fn new(seed: u64, words: &'static [&'static str], bytes_max: usize) -> Self {
        Self {
            random: seed,
            words,
            bytes_max,
        }
    }

    /// Returns a mutated copy of a corpus entry.
    pub fn next(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut input = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(CHANGES_MAX) {
            self.change(&mut input, corpus);
        }
        input.truncate(self.bytes_max);
        input
    }

    /// Returns the next number of SplitMix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.random() % n.max(1) as u64) as usize
    }

    /// Picks a piece of an input of `len` bytes. Short pieces are more likely.
    fn piece(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len);
        let most = if self.below(4) == 0 {
            len - start
        } else {
            (len - start).min(16)
        };
        start..start + self.below(most + 1)
    }

    fn change(&mut self, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let is_inside = at < input.len();
        match self.below(10) {
            0 if is_inside => input[at] ^= 1 << self.below(8),
            1 if is_inside => input[at] = self.random() as u8,
            2 if is_inside => drop(input.remove(at)),
            3 => input.insert(at, self.random() as u8),
            4 => drop(input.drain(self.piece(input.len()))),
            5 => {
                let word = self.words[self.below(self.words.len())];
                drop(input.splice(at..at, word.bytes()));
            }
            6 => self.number(input),
            7 => {
                let other = &corpus[self.below(corpus.len())];
                let piece = &other[self.piece(other.len())];
                drop(input.splice(at..at, piece.iter().copied()));
            }
            8 => {
                let piece = input[self.piece(input.len())].to_vec();
                let most = if self.below(16) == 0 { REPEATS_MAX } else { 4 };
                let times = (1 + self.below(most)).min(self.bytes_max / piece.len().max(1));
                drop(input.splice(at..at, piece.repeat(times)));
            }
            _ if is_inside => {
                let piece = self.piece(input.len());
                let byte = self.random() as u8;
                input[piece].fill(byte);
            }
            _ => {}
        }
    }

    /// Replaces a number in the input, if there is one, with another number.
    fn number(&mut self, input: &mut Vec<u8>) {
        let digits: Vec<usize> = (0..input.len())
            .filter(|at| input[*at].is_ascii_digit())
            .collect();
        if digits.is_empty() {
            return;
        }
        let start = digits[self.below(digits.len())];
        let len = input[start..]
            .iter()
            .take_while(|b| b.is_ascii_digit())
            .count();
        let number = match self.below(NUMBERS.len() + 2) {
            n if n < NUMBERS.len() => NUMBERS[n].to_owned(),
            n if n == NUMBERS.len() => self.random().to_string(),
            _ => self.below(1000).to_string(),
        };
        drop(input.splice(start..start + len, number.into_bytes()));
    }
}
