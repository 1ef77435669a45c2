//! The shapes that a paged KV cache gives to the transfers of known models.

use std::fmt;

use clap::{Args, ValueEnum};

/// A model, by the public numbers of its configuration (`config.json` of its release).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Model {
    /// 32 layers, 8 KV heads of 128
    #[value(name = "llama-3.1-8b")]
    Llama8b,
    /// 80 layers, 8 KV heads of 128
    #[value(name = "llama-3.1-70b")]
    Llama70b,
    /// 126 layers, 8 KV heads of 128
    #[value(name = "llama-3.1-405b")]
    Llama405b,
    /// 32 layers, 8 KV heads of 128
    #[value(name = "mixtral-8x7b")]
    Mixtral8x7b,
    /// 28 layers, 4 KV heads of 128
    #[value(name = "qwen2.5-7b")]
    Qwen7b,
    /// 64 layers, 8 KV heads of 128
    #[value(name = "qwen3-32b")]
    Qwen32b,
    /// 61 layers, one latent of 576 for all heads
    #[value(name = "deepseek-v3")]
    DeepSeekV3,
}

/// What a token leaves in the cache of one layer.
enum Cache {
    /// A key and a value in tensors of their own, for each KV head.
    Heads { heads: usize, head_size: usize },
    /// One vector for all heads, of which every rank has the whole.
    Latent { size: usize },
}

impl Model {
    fn layers_and_cache(self) -> (usize, Cache) {
        let heads = |heads| Cache::Heads { heads, head_size: 128 };
        match self {
            Self::Llama8b | Self::Mixtral8x7b => (32, heads(8)),
            Self::Llama70b => (80, heads(8)),
            Self::Llama405b => (126, heads(8)),
            Self::Qwen7b => (28, heads(4)),
            Self::Qwen32b => (64, heads(8)),
            Self::DeepSeekV3 => (61, Cache::Latent { size: 512 + 64 }),
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArgs {
    /// Block lists of scenario `kv` as one rank of a model transfers them for one request, beside those of --kv and in the place of
    /// its default
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "Cases")]
    pub(crate) model: Vec<Model>,
    /// Tokens of the request
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=10_000_000), help_heading = "Cases")]
    pub(crate) sequence_length: u32,
    /// Tokens in a block of the cache
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Cases")]
    pub(crate) block_tokens: u32,
    /// Ranks that the model's heads are spread over
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Cases")]
    pub(crate) tensor_parallel: u32,
    /// Bytes of a number in the cache: 2 for bf16, 1 for fp8
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4), help_heading = "Cases")]
    pub(crate) element_bytes: u32,
}

impl ModelArgs {
    /// Blocks and their bytes for each model that was named.
    pub(crate) fn shapes(&self) -> Vec<(usize, usize)> {
        self.model.iter().map(|&model| self.shape(model)).collect()
    }

    /// What each shape stands for, in words.
    pub(crate) fn descriptions(&self) -> Vec<String> {
        let describe = |&model: &Model| {
            let (blocks, bytes) = self.shape(model);
            format!(
                "{model}, {} tokens in blocks of {}, TP {}, {} bytes an element: {blocks}x{}",
                self.sequence_length,
                self.block_tokens,
                self.tensor_parallel,
                self.element_bytes,
                crate::units::Bytes(bytes)
            )
        };
        self.model.iter().map(describe).collect()
    }

    /// Blocks and their bytes of a request of so many tokens, where one model was named.
    pub(crate) fn shape_of_request(&self, tokens: u32) -> Option<(usize, usize)> {
        match self.model[..] {
            [model] => Some(self.shape_for(model, tokens)),
            _ => None,
        }
    }

    fn shape(&self, model: Model) -> (usize, usize) {
        self.shape_for(model, self.sequence_length)
    }

    fn shape_for(&self, model: Model, sequence_length: u32) -> (usize, usize) {
        let (layers, cache) = model.layers_and_cache();
        let whole = |number: u32| number as usize;
        let pages = whole(sequence_length).div_ceil(whole(self.block_tokens));
        let tokens = whole(self.block_tokens) * whole(self.element_bytes);
        match cache {
            // Fewer heads than ranks are replicated: each has one at least.
            Cache::Heads { heads, head_size } => {
                let heads = heads.div_ceil(whole(self.tensor_parallel));
                (layers * 2 * pages, tokens * heads * head_size)
            }
            Cache::Latent { size } => (layers * pages, tokens * size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        model: ModelArgs,
    }

    fn args(words: &str) -> ModelArgs {
        Line::parse_from(std::iter::once("x").chain(words.split_whitespace())).model
    }

    #[test]
    fn shapes_are_those_of_the_models_caches() {
        // 128 pages of 16 tokens; a key or a value of 8 heads of 128 numbers of 2 bytes.
        assert_eq!(args("--model llama-3.1-8b").shapes(), [(32 * 2 * 128, 16 * 8 * 128 * 2)]);
        let spread =
            args("--model llama-3.1-70b,deepseek-v3 --tensor-parallel 4 --element-bytes 1");
        assert_eq!(spread.shapes(), [(80 * 2 * 128, 16 * 2 * 128), (61 * 128, 16 * 576)]);
        // More ranks than heads, and a request that ends within a page.
        let odd = args("--model qwen2.5-7b --tensor-parallel 8 --sequence-length 17");
        assert_eq!(odd.shapes(), [(28 * 2 * 2, 16 * 128 * 2)]);
        assert_eq!(args("").shapes(), []);
    }

    #[test]
    fn a_shape_says_what_it_stands_for() {
        let description = args("--model mixtral-8x7b --sequence-length 1024").descriptions();
        assert_eq!(
            description,
            ["mixtral-8x7b, 1024 tokens in blocks of 16, TP 1, 2 bytes an element: 4096x32KiB"]
        );
    }
}
