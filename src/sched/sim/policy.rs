//! Decides at each point which task runs next.

/// Random numbers from a seed (Vigna's SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Different streams of a seed are independent.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed ^ stream.wrapping_mul(0xD1B5_4A32_D192_ED03));
        random.next();
        random
    }

    #[allow(clippy::should_implement_trait)] // It never ends.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// How a simulation chooses the next task.
#[derive(Clone, Debug)]
pub enum Policy {
    /// At one of this many points, a random task runs next. A task that waits is followed by a
    /// random one.
    Walk(u64),
    /// Every task has a random priority, and the highest runs. At some random points, the
    /// running task gets the lowest priority (Burckhardt et al., "A randomized scheduler with
    /// probabilistic guarantees of finding bugs").
    Priorities(Vec<u64>),
}

/// About how many points a simulation has, for [`Policy::Priorities`].
const POINTS: u64 = 20_000;
const CHANGES_MAX: u64 = 12;

impl Policy {
    /// Draws a policy. Half of them walk, most often with few changes of the running task, because
    /// most faults need only a few changes at the right points.
    pub fn draw(random: &mut Random) -> Self {
        if random.one_in(3) {
            let changes = random.below(CHANGES_MAX);
            let mut at: Vec<u64> = (0..changes).map(|_| random.below(POINTS)).collect();
            at.sort_unstable();
            return Policy::Priorities(at);
        }
        const ONE_IN: [u64; 6] = [8, 16, 32, 64, 128, 512];
        Policy::Walk(ONE_IN[random.below(ONE_IN.len() as u64) as usize])
    }
}
