// Words that the nodes show while they run, in the language of the frontend. The server writes them in English.
import { app } from "../../scripts/app.js";

const NUMBER = "(\\d+(?:[.,]\\d+)*(?:e[+-]?\\d+)?)";
const CHINESE = [
  // Train L2P.
  ["Not trained yet", "尚未训练"],
  ["Preparing", "准备中"],
  ["Stop and save", "停止并保存"],
  ["Open the report", "打开报告"],
  ["loss at sigma", "各 sigma 区间的损失"],
  ["Montage of step (\\d+)", "第 $1 步的拼图"],
  [`Step ${NUMBER} of ${NUMBER}`, "第 $1 步，共 $2 步"],
  [`about ${NUMBER} seconds left`, "约剩 $1 秒"],
  [`about ${NUMBER} minutes left`, "约剩 $1 分钟"],
  [`about ${NUMBER} hours left`, "约剩 $1 小时"],
  [`${NUMBER} images a second`, "每秒 $1 张图像"],
  [`${NUMBER} GB at most`, "最多占用 $1 GB"],
  [`Stopped after ${NUMBER} of ${NUMBER} steps`, "已在第 $1 步停止，共 $2 步"],
  [`Finished after ${NUMBER} steps`, "已完成 $1 步"],
  ["all is saved", "全部已保存"],
  ["the last save is of step (\\d+)", "最近一次保存在第 $1 步"],
  ["run it again to resume from the last save", "再次运行即从最近一次保存处恢复"],
  ["^Stopped\\b", "已停止"],
  // Compare L2P and Evaluate L2P.
  ["^Run it to see both models$", "运行后显示两个模型的图像"],
  ["^Slider$", "滑块"],
  ["^Side by side$", "并排"],
  ["^Difference$", "差异"],
  ["^difference$", "差异"],
  ["^source$", "来源模型"],
  ["^pixel model$", "像素模型"],
  ["^seed$", "种子"],
  ["^Previous pair$", "上一对"],
  ["^Next pair$", "下一对"],
  ["^Converting: ", "转换中："],
  ["^Loading: ", "加载中："],
  ["^Looking at images: ", "检查图像："],
  ["^Encoding captions: ", "编码标题文字："],
  ["^Images of the source: ", "生成来源模型的图像："],
  ["^Montage: ", "拼图："],
  // What was loaded, and what to know of an image.
  [`Tiny L2P model, ${NUMBER} x ${NUMBER} pixels`, "微型 L2P 模型，$1 x $2 像素"],
  [`L2P (\\w+) model, ${NUMBER} x ${NUMBER} pixels`, "L2P $1 模型，$2 x $3 像素"],
  [`In KSampler: ${NUMBER} steps, cfg ${NUMBER}, euler, simple\\.`, "KSampler 设置：$1 步、cfg $2、euler、simple。"],
  [
    "This is a pixel initialisation that nobody has trained yet: it makes noise. Train it with Train L2P first",
    "这是尚未训练的像素初始化模型，只会生成噪声。请先用“训练 L2P”训练",
  ],
  [
    "(\\d+ x \\d+) is much (?:larger|smaller) than the (\\d+ x \\d+) pixels that this model was trained at",
    "$1 与该模型训练时的 $2 像素相差很大",
  ],
  ["the image may come out wrong", "图像可能出错"],
  ["Width and height 0 take the model's own size", "宽和高设为 0 即采用模型自己的尺寸"],
  [
    "These are the pixels of an L2P model, not a latent: use Pixels to Image in place of VAE Decode",
    "这是 L2P 模型的像素，不是潜空间 LATENT：请用“像素转图像”代替“VAE 解码”",
  ],
  // Punctuation behind words that are Chinese by now.
  ["(?<=[\u4e00-\u9fff”])\\. ?", "。"],
  ["(?<=[\u4e00-\u9fff]), ", "，"],
  ["(?<=[\u4e00-\u9fff]); ", "；"],
  ["(?<=[\u4e00-\u9fff]): ", "："],
].map(([english, chinese]) => [new RegExp(english, "g"), chinese]);

export function say(text) {
  const locale = String(app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en");
  if (!locale.startsWith("zh")) return text;
  return CHINESE.reduce((words, [english, chinese]) => words.replace(english, chinese), text);
}
