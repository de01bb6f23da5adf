// Words that the nodes show while they run, in the language of the frontend. The server writes them in English.
import { app } from "../../scripts/app.js";

const NUMBER = "([\\d.,e+-]+)";
const CHINESE = [
  ["Not trained yet", "尚未训练"],
  ["Preparing", "准备中"],
  ["Stop and save", "停止并保存"],
  ["Open the report", "打开报告"],
  ["loss at sigma", "损失，sigma"],
  ["Montage of step (\\d+)", "第 $1 步的拼图"],
  [`Step ${NUMBER} of ${NUMBER}`, "第 $1 步，共 $2 步"],
  [`about ${NUMBER} seconds left`, "约剩 $1 秒"],
  [`about ${NUMBER} minutes left`, "约剩 $1 分钟"],
  [`about ${NUMBER} hours left`, "约剩 $1 小时"],
  [`${NUMBER} images a second`, "每秒 $1 张图像"],
  [`${NUMBER} GB at most`, "最多占用 $1 GB"],
  [`Stopped after ${NUMBER} of ${NUMBER} steps`, "已在第 $1 步停止（共 $2 步）"],
  [`Finished after ${NUMBER} steps`, "已完成，共 $1 步"],
  ["all is saved", "全部已保存"],
  ["the last save is of step (\\d+)", "最近一次保存在第 $1 步"],
  ["run it again to resume from the last save", "再次运行即从最近一次保存处继续"],
  ["^Stopped\\b", "已停止"],
  ["^Montage: ", "拼图："],
].map(([english, chinese]) => [new RegExp(english, "g"), chinese]);

export function say(text) {
  const locale = String(app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en");
  if (!locale.startsWith("zh")) return text;
  return CHINESE.reduce((words, [english, chinese]) => words.replace(english, chinese), text);
}
